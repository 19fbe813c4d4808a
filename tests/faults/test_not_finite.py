"""A step that is not finite on one rank changes nothing on any."""

import pytest
from runs import finish, last, lines, same, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
EPOCH = 13  # steps of an epoch on two ranks


def states(run_dir, rank):
    """Hash of weights and optimizer after each batch."""
    return [hash_ for _, hash_ in lines(run_dir / f"states-{rank}.txt")]


@pytest.mark.parametrize(
    ("option", "accumulate"),
    [
        ("--trainer.gradient_clip_val=1.0", 1),
        ("--trainer.gradient_clip_val=null", 1),
        ("--trainer.gradient_clip_algorithm=value", 1),
        ("--trainer.gradient_clip_val=1.0", 2),
    ],
)
def test_a_batch_that_is_not_finite_on_one_rank_is_skipped_on_both(
    store, tmp_path, tally, option, accumulate
):
    run_dir = tmp_path / "run"
    finish(
        run_dir,
        store,
        "--trainer.max_epochs=1",
        option,
        f"--trainer.accumulate_grad_batches={accumulate}",
        ranks=2,
        inject=[("Poison", {"batches": [3, 5, 6], "rank": 1}), ("States", {})],
    )
    first, second = states(run_dir, 0), states(run_dir, 1)
    assert len(first) == EPOCH
    # Batches after which nothing may have changed: with two per step, 3 spoils 4 and 5 spoils 6.
    stepping = range(1, EPOCH + 1) if accumulate == 1 else [*range(2, EPOCH, 2), EPOCH]
    spoilt = {3, 5, 6} if accumulate == 1 else {4, 6}
    problems = []
    for batch in stepping:
        before = first[batch - 1 - accumulate] if batch > accumulate else None
        unchanged = first[batch - 1] == before
        if unchanged != (batch in spoilt):
            problems.append(f"batch {batch}: weights {'un' if unchanged else ''}changed")
        elif first[batch - 1] != second[batch - 1]:
            problems.append(f"batch {batch}: the ranks differ")
        else:
            problems.append("")
    skipped = last(run_dir)["progress"]["skipped"]
    problems.append("" if skipped == len(spoilt) else f"{skipped} counted")
    tally(f"not finite on one of two ranks, {option.split('_')[-1]}, {accumulate} per step",
          problems)  # fmt: skip


@pytest.mark.short
def test_three_such_steps_in_a_row_end_the_run_with_a_checkpoint(store, tmp_path, tally):
    run_dir = tmp_path / "run"
    poison = ("Poison", {"batches": [2, 3, 5, 6, 7], "rank": 1})
    run = start(run_dir, store, ranks=2, every_n_steps=1, inject=[poison])
    code, said = run.wait(), run.said()
    assert "not finite in 3 steps in a row (5 in all)" in said and "Traceback" not in said
    saved = last(run_dir)
    problems = ["" if code == 1 else f"exit code {code}"]
    problems.append("" if saved["global_step"] == 7 else f"step {saved['global_step']}")
    good = last(run_dir, "step-4.ckpt")
    problems.append("" if same(saved["state_dict"], good["state_dict"]) else "weights changed")
    finish(run_dir, store, "--ckpt_path", "last", ranks=2)  # goes on after them
    problems.append("" if last(run_dir)["progress"]["skipped"] == 5 else "count lost")
    tally("three steps in a row not finite", problems)
