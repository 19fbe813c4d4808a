"""What long stages say where no terminal is."""

import logging
import os

import pytest

from peagle import progress as module
from peagle.next_step import after_fit
from peagle.progress import progress, track
from peagle.quiet import is_needed


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_long_stage_prints_a_line_every_half_minute_and_a_last_one(clock, capsys):
    with progress("answers", 100, done=10, unit="answers") as bar:
        for _ in range(9):
            clock[0] += 10
            bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "answers: 40/100 (40%), 1.00 answers/s, 01:00 left",
        "answers: 70/100 (70%), 1.00 answers/s, 00:30 left",
        "answers: 100/100 (100%), 1.00 answers/s, took 01:30",
    ]


def test_the_first_of_many_does_not_tell_how_long_the_others_take(clock, capsys):
    """An engine answers many prompts at once, and the first ends long before the others."""
    with progress("answers", 100) as bar:
        clock[0] += 50
        bar.update()
    assert capsys.readouterr().err == "answers: 1/100 (1%), 0.02 it/s\n"


def test_a_short_stage_says_nothing(clock, capsys):
    for _ in track("answers", range(3)):
        clock[0] += 5
    assert capsys.readouterr().err == ""


def test_the_summary_of_a_fit_names_what_is_there_and_the_next_commands(tmp_path):
    for name in ("drafter/config.json", "card/README.md"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    os.utime(tmp_path / "card/README.md", (0, 0))  # an earlier fit's
    assert "card" not in after_fit(tmp_path, "org/target", None)
    (tmp_path / "card/README.md").touch()
    text = after_fit(tmp_path, "org/target", "abc")
    assert "curve" not in text and f"card        {tmp_path}/card/README.md" in text
    bench = f"python -m peagle bench --drafter {tmp_path}/drafter --target org/target"
    assert f"{bench} --revision abc\n" in text
    assert text.endswith(f"python -m peagle publish --run {tmp_path} --repo_id OWNER/NAME")


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("💡 Tip: For seamless cloud logging, try installing litlogger", False),
        ("Loading `train_dataloader` to estimate number of stepping batches.", False),
        ("`Trainer.fit` stopped: `max_steps=20` reached.", True),
        ("GPU available: False, used: False", True),
    ],
)
def test_advertisements_are_dropped_and_news_is_not(message, needed):
    record = logging.LogRecord("x", logging.INFO, "", 0, message, None, None)
    assert is_needed(record) is needed
