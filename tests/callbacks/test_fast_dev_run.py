"""Lightning promises that a run with ``fast_dev_run`` leaves nothing behind."""

from short_fits import make_data, make_module, make_trainer

from peagle.callbacks.checkpoint import Checkpoint
from peagle.callbacks.evaluate import Evaluate
from peagle.callbacks.progress import TrainCsv
from peagle.callbacks.record import RunRecord


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
