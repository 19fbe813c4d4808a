"""Lightning promises that a run with ``fast_dev_run`` leaves nothing behind."""

import json
from pathlib import Path

import pytest
from short_fits import make_data, make_module, make_trainer

from peagle.callbacks.checkpoint import Checkpoint
from peagle.callbacks.evaluate import Evaluate
from peagle.callbacks.progress import TrainCsv
from peagle.callbacks.record import RunRecord
from peagle.preflight import refuse_foreign_files, refuse_other_run
from peagle.target.target import TargetSource


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


def test_a_fit_refuses_the_folder_of_another_targets_run(tmp_path):
    target = TargetSource("tiny")
    record = {"target": {"fingerprint": target.fingerprint(), "name_or_path": "org/other"}}
    for fingerprint in (None, record["target"]["fingerprint"]):
        record["target"]["fingerprint"] = fingerprint
        (tmp_path / "provenance.json").write_text(json.dumps(record))
        refuse_other_run(tmp_path, target)
    record["target"]["fingerprint"] = "another"
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"holds a run of another target \(org/other\)"):
        refuse_other_run(tmp_path, target)


def test_a_fit_refuses_a_configuration_of_the_users_own_in_its_folder(tmp_path):
    path = Path(tmp_path / "config.yaml")
    path.write_text("# lightning.pytorch==2.6.6\nseed_everything: 0\n")
    refuse_foreign_files(tmp_path)
    path.write_text("# my recipe\nseed_everything: 0\n")
    with pytest.raises(ValueError, match=r"config\.yaml was not written by a fit"):
        refuse_foreign_files(tmp_path)
