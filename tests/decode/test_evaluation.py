"""What ``test`` makes of decoding: rows for every drafter, a baseline beside ours, latency."""

import json

import lightning as L
import pytest
import torch
from random_parts import make_drafter

from peagle.callbacks.evaluate import Evaluate
from peagle.capture.prompts import PromptSource
from peagle.card.run_files import RunFiles
from peagle.cod.sampling import Cod
from peagle.decode.acceptance import acceptance_rows
from peagle.decode.decoder import Decoded
from peagle.decode.evaluation import EvaluationConfig, Run
from peagle.model.restore import PARTS
from peagle.target.target import TargetSource
from peagle.train.datamodule import HiddenStatesDataModule
from peagle.train.module import PEagleModule


def decoded(accepted, seconds, draft_seconds):
    tokens = [list(range(sum(rounds) + len(rounds))) for rounds in accepted]
    return Decoded(tokens, accepted, seconds, draft_seconds)


def test_every_drafter_has_rows_beside_none_and_our_own_comes_first():
    runs = [
        Run("code", None, 0, 0.0, decoded([[0, 0, 0, 0]], 2.0, []), 1),
        Run("code", "p-eagle", 3, 0.0, decoded([[2, 0]], 1.0, [0.5, 0.004]), 1),
        Run("code", "eagle3", 3, 0.0, decoded([[1, 1]], 4.0, [0.9, 0.010]), 1),
        Run("code", None, 0, 0.0, decoded([[0, 0]], 1.0, []), 1),
        Run("code", "p-eagle", 3, 0.0, decoded([[1]], 1.0, [0.5]), 1),
        Run("code", "eagle3", 3, 0.0, decoded([[1]], 1.0, [0.5, 0.012, 0.020]), 1),
    ]
    ours, baseline = acceptance_rows(runs, engine="loop", dtype="float32")
    assert (ours["method"], baseline["method"]) == ("p-eagle", "eagle3")
    assert ours["acceptance_length"] == baseline["acceptance_length"] == 2.0
    assert ours["per_position"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert baseline["per_position"] == pytest.approx([1, 0, 0])
    assert ours["tokens_per_second"] == 3.0 and baseline["tokens_per_second"] == pytest.approx(1.2)
    assert ours["baseline_tokens_per_second"] == baseline["baseline_tokens_per_second"] == 2.0
    assert ours["lossless_prompts"] == baseline["lossless_prompts"] == 2
    # First rounds read the prompts and do not count.
    assert ours["draft_ms_per_round"] == pytest.approx(4.0)
    assert baseline["draft_ms_per_round"] == pytest.approx(12.0)


def test_a_drafter_that_never_came_to_a_second_round_has_no_latency():
    runs = [
        Run("code", None, 0, 0.0, decoded([[0]], 1.0, []), 1),
        Run("code", "eagle3", 5, 0.0, decoded([[1]], 1.0, [0.5]), 1),
    ]
    (row,) = acceptance_rows(runs, engine="loop", dtype="float32")
    assert row["draft_ms_per_round"] is None


def test_a_baseline_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"none\.ckpt does not exist"):
        EvaluationConfig(baseline=str(tmp_path / "none.ckpt"))


def checkpoint(path, drafter):
    """What ``load_drafter`` reads of a checkpoint of ``fit``."""
    weights = {f"drafter.{name}": tensor for name, tensor in drafter.state_dict().items()}
    parts = {"drafter_config": drafter.config.to_dict(), "state_dict": weights}
    torch.save({part: {} for part in PARTS} | parts, path)
    return str(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("parallel", "names"),
    [(False, ["p-eagle", "eagle3"]), (True, ["p-eagle", "p-eagle (baseline)"])],
    ids=["of the other kind", "of the same kind"],
)
def test_the_table_of_test_shows_a_baseline_beside_ours_and_the_card_does_not(
    tmp_path, capsys, parallel, names
):
    target = TargetSource("tiny").config()
    shape = {
        "vocab_size": target.vocab_size,
        "target_hidden_size": target.hidden_size,
        "num_hidden_layers": 1,
    }
    baseline = make_drafter(**shape, parallel_drafting=parallel).float()
    module = PEagleModule(mask_token_id=3)
    module.drafter = make_drafter(**shape).float()
    data = HiddenStatesDataModule(
        target="tiny",
        revision=None,
        store=str(tmp_path / "no store"),
        cod=Cod(),
        mask_token_id=3,
        evaluation=EvaluationConfig(
            prompts=[PromptSource("stdlib", "test", limit=2)],
            k=(2,),
            max_new_tokens=6,
            batch_size=2,
            baseline=checkpoint(tmp_path / "baseline.ckpt", baseline),
        ),
    )
    trainer = L.Trainer(
        default_root_dir=str(tmp_path),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Evaluate()],
    )
    trainer.test(module, datamodule=data, verbose=False)
    rows = json.loads((tmp_path / "metrics" / "acceptance.json").read_text())["rows"]
    assert [row["method"] for row in rows] == names
    assert all(row["lossless_prompts"] == row["prompts"] == 2 for row in rows)
    assert all(row["draft_ms_per_round"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert all(f"{name}  2" in shown for name in names) and shown.count(" ms") == 2
    run_files = RunFiles.read(tmp_path, tmp_path / "drafter")
    assert [row["method"] for row in run_files.acceptance.rows] == names[:1]
