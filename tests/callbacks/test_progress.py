"""What a fit logs of itself, to which loggers, and what it shows without a terminal."""

import csv
import logging
import re

import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from short_fits import make_data, make_module, make_trainer

from peagle import progress
from peagle.arguments import refuse_save_dir
from peagle.callbacks.progress import Progress, Speed, TrainCsv
from peagle.train.metrics import logged_names

LOGGED = {"train/loss", "train/accuracy_d0", "train/tokens_per_second", "train/memory_gb",
          "train/lr", "val/loss", "val/accuracy_d0", "val/acceptance_length"}  # fmt: skip


def test_a_fit_logs_everything_to_every_logger_and_draws_its_curve(
    tmp_path, random_store, monkeypatch, capsys, caplog
):
    caplog.set_level(logging.WARNING, "lightning.pytorch")
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    trainer = make_trainer(
        tmp_path, 4, callbacks=[Progress()], limit_val_batches=1, val_check_interval=2,
        check_val_every_n_epoch=None, enable_progress_bar=True, log_every_n_steps=2,
        logger=[TrainCsv(str(tmp_path)), CSVLogger(tmp_path)],
    )  # fmt: skip
    trainer.fit(make_module(), datamodule=make_data(random_store))
    for path in (tmp_path / "metrics/train.csv", *tmp_path.glob("lightning_logs/*/metrics.csv")):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        assert rows[0].keys() >= LOGGED, path
        speeds = [float(v) for row in rows if (v := row["train/tokens_per_second"])]
        assert len(speeds) == 2 and min(speeds) > 0
    known = {*logged_names(4, validated=True), *Progress.logs}
    assert trainer.callback_metrics.keys() == known  # what preflight lets a callback watch
    with Image.open(tmp_path / "metrics/curve.png") as image:
        image.verify()
    lines = capsys.readouterr().err.splitlines()
    steps = [line for line in lines if line.startswith("fit: ")]
    assert [re.match(r"fit: (\d/4)", line)[1] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    assert re.search(r"loss [\d.]+, accuracy by depth [\d. ]+, .* tokens/s, ", steps[2])
    assert sum(line.startswith("step 2, validation: loss") for line in lines) == 1


def test_a_run_that_is_never_to_log_trains(tmp_path, random_store):
    trainer = make_trainer(tmp_path, 2, callbacks=[Progress()], limit_val_batches=0,
                           enable_progress_bar=True, log_every_n_steps=0)  # fmt: skip
    trainer.fit(make_module(), datamodule=make_data(random_store))
    assert trainer.global_step == 2


def test_the_time_of_validation_does_not_slow_the_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("peagle.callbacks.progress.time.monotonic", lambda: now[0])
    speed = Speed()
    speed.start(0, 0)
    now[0] += 10
    speed.pause()
    now[0] += 1000
    speed.resume()
    assert speed.over_all(500) == speed.since_last(500) == pytest.approx(50)


@pytest.mark.parametrize("option", ["save_dir=x", "init_args.save_dir"])
def test_a_folder_for_a_logger_is_refused_as_the_run_has_one(option):
    refuse_save_dir(["fit", "--trainer.logger+=CSVLogger", "--trainer.logger.name=x"])
    with pytest.raises(ValueError, match="goes into --run_dir"):
        refuse_save_dir(["fit", f"--trainer.logger.{option}"])
