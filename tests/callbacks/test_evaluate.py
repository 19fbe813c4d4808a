"""Whose figures the tables of a run are."""

import json

from short_fits import make_data, make_module, make_trainer

from peagle.callbacks.checkpoint import Checkpoint
from peagle.callbacks.evaluate import Evaluate
from peagle.card.run_files import sha256
from peagle.serve.export import export_drafter


def test_a_table_names_the_exported_weights_and_the_step_that_it_was_measured_on(
    tmp_path, random_store
):
    module, data = make_module(), make_data(random_store)
    make_trainer(tmp_path, 2, callbacks=[Checkpoint()]).fit(module, datamodule=data)
    export_drafter(module.drafter, tmp_path / "drafter")
    trainer = make_trainer(tmp_path, 2, limit_val_batches=1, callbacks=[Evaluate()])
    last = tmp_path / "checkpoints" / "last.ckpt"
    trainer.validate(make_module(), datamodule=data, ckpt_path=last, verbose=False)
    found = json.loads((tmp_path / "metrics/validate.json").read_text())["provenance"]
    exported = sha256(tmp_path / "drafter/model.safetensors")
    assert (found["step"], found["weights_sha256"]) == (2, exported)
