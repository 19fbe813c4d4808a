"""Lightning promises that a run with ``fast_dev_run`` leaves nothing behind."""

from pathlib import Path

import pytest
from short_fits import make_data, make_module, make_trainer

from peagle.callbacks.checkpoint import Checkpoint
from peagle.callbacks.evaluate import Evaluate
from peagle.callbacks.progress import TrainCsv
from peagle.callbacks.record import RunRecord
from peagle.cli import refuse_foreign_files


def test_a_fast_dev_run_leaves_a_finished_run_as_it_is(tmp_path, random_store):
    run = tmp_path / "run"
    for name in ("checkpoints/last.ckpt", "checkpoints/last.ckpt.tmp", "metrics/validate.json",
                 "provenance.json", "drafter/config.json"):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("kept")
    callbacks = [Checkpoint(every_n_steps=1), Evaluate(), RunRecord()]
    trainer = make_trainer(
        run, -1, fast_dev_run=True, callbacks=callbacks, logger=TrainCsv(str(run))
    )
    module, data = make_module(), make_data(random_store)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1
    trainer.validate(module, datamodule=data, verbose=False)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) == 5 and {path.read_text() for path in files} == {"kept"}


def test_a_fit_refuses_a_configuration_of_the_users_own_in_its_folder(tmp_path):
    path = Path(tmp_path / "config.yaml")
    path.write_text("# lightning.pytorch==2.6.6\nseed_everything: 0\n")
    refuse_foreign_files(tmp_path)
    path.write_text("# my recipe\nseed_everything: 0\n")
    with pytest.raises(ValueError, match=r"config\.yaml was not written by a fit"):
        refuse_foreign_files(tmp_path)
