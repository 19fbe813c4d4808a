"""A resumed run is the run that was never interrupted: every loss and every weight, to the bit."""

import random
import shutil
from pathlib import Path

import pytest
import toy
from runs import each, finish, last, lines, losses, same_training, some, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS, EPOCH = 50, 25
RESUME = ("--ckpt_path", "last")


def workers(number: int) -> str:
    return f"--data.num_workers={2 * (number % 2)}"


def copy_of(reference: Path, run_dir: Path, step: int) -> None:
    """A run folder as it was when the run was killed right after that step."""
    (run_dir / "checkpoints").mkdir(parents=True)
    shutil.copy(reference / f"checkpoints/step-{step}.ckpt", run_dir / "checkpoints/last.ckpt")


def test_the_reference_has_the_length_that_these_tests_assume(reference):
    assert sorted(losses(reference)) == list(range(1, STEPS + 1))
    assert last(reference)["global_step"] == STEPS
    assert len({loss for values in losses(reference).values() for loss in values}) == STEPS


@pytest.mark.short
def test_every_step_is_a_resume_point(store, reference, tmp_path, tally):
    def resumed(step: int) -> str:
        run_dir = tmp_path / f"from-{step}"
        copy_of(reference, run_dir, step)
        file = ("--ckpt_path", str(run_dir / "checkpoints/last.ckpt"))
        run = start(run_dir, store, *(RESUME if step % 3 else file), workers(step))
        if run.wait() != 0:
            return f"step {step}: {run.said()[-500:]}"
        problem = same_training(run_dir, reference)
        first = min(losses(run_dir))
        return problem or ("" if first == step + 1 else f"step {step}: goes on at {first}")

    points = range(1, STEPS) if some(1, 0) else [7, EPOCH, EPOCH + 1]
    tally("resume from a step, bitwise", each(resumed, points))


def test_a_finished_run_that_is_started_again_changes_nothing(store, reference, tmp_path):
    copy_of(reference, tmp_path / "run", STEPS)
    finish(tmp_path / "run", store, *RESUME)
    assert last(tmp_path / "run")["global_step"] == STEPS
    assert not (tmp_path / "run/losses-0.txt").exists()


@pytest.mark.short
@pytest.mark.parametrize("count", [0, 2])
def test_kill_9_at_a_random_step(store, reference, tmp_path, tally, count):
    draw = random.Random(6 + count)
    phases = ("start", "backward", "optimizer", "end")
    trials = [(draw.randrange(5, STEPS + 1), draw.choice(phases)) for _ in range(some(20, 2))]

    def killed(trial: int) -> str:
        batch, phase = trials[trial]
        run_dir = tmp_path / f"kill-{trial}"
        fault = {"batch": batch, "phase": phase, "kill": True}
        loader = f"--data.num_workers={count}"
        first = start(run_dir, store, loader, inject=[("Fail", fault)])
        if (code := first.wait()) != -9:
            return f"{fault}: exit code {code}: {first.said()[-500:]}"
        if last(run_dir)["global_step"] != (batch - 1) // 4 * 4:
            return f"{fault}: the last checkpoint is of step {last(run_dir)['global_step']}"
        other = f"--data.num_workers={2 - count}" if trial % 4 == 3 else loader
        second = start(run_dir, store, "--ckpt_path", "last", other)
        return "" if second.wait() == 0 and same_training(run_dir, reference) == "" else (
            f"{fault}: {same_training(run_dir, reference)} {second.said()[-500:]}"
        )  # fmt: skip

    tally(f"kill -9 at a random step, {count} workers, bitwise", each(killed, range(len(trials))))


def test_a_run_with_the_optimizer_of_the_quickstart_resumes_too(store, tmp_path, tally):
    muon = "--model.optimizer=peagle.train.optimizer.MuonAdamW"
    finish(tmp_path / "whole", store, muon)
    run_dir = tmp_path / "run"
    fault = {"batch": 31, "phase": "backward", "kill": True}
    assert start(run_dir, store, muon, inject=[("Fail", fault)]).wait() == -9
    finish(run_dir, store, muon, *RESUME)
    tally("kill -9 with Muon, bitwise", [same_training(run_dir, tmp_path / "whole")])


def test_checkpoints_are_written_by_the_clock_too(store, reference, tmp_path, tally):
    run_dir = tmp_path / "run"
    slow, fault = {"seconds": 0.1}, {"batch": 20, "phase": "start", "kill": True}
    clock = "--trainer.callbacks.init_args.minutes=0.003"
    faults = [("Slow", slow), ("Fail", fault)]
    run = start(run_dir, store, clock, inject=faults, every_n_steps=1000)
    assert run.wait() == -9, run.said()
    saved = last(run_dir)["global_step"]
    assert len(list((run_dir / "checkpoints").glob("step-*.ckpt"))) < 19, "at every step"
    finish(run_dir, store, *RESUME)
    problem = "" if 10 <= saved <= 19 else f"the checkpoint is of step {saved}"
    tally("kill -9, checkpoints by time", [problem or same_training(run_dir, reference)])


# Which step is the last that can be saved, if batch 18 of 25 fails with or without accumulation.
EXCEPTIONS = {
    ("start", 1): 17,
    ("backward", 1): 17,
    ("optimizer", 1): 17,
    ("update", 1): 16,  # weights in the middle of an update are not saved; step 16 was
    ("end", 1): 18,
    ("start", 4): 4,  # four optimizer steps are sixteen batches
    ("backward", 4): 4,
    ("end", 4): 4,
    ("validation", 1): 25,
    ("validation", 4): 7,
}


@pytest.mark.parametrize(("phase", "accumulate"), EXCEPTIONS)
def test_an_exception_leaves_a_checkpoint_of_the_last_finished_step(
    store, reference, tmp_path, tally, phase, accumulate
):
    accumulation = f"--trainer.accumulate_grad_batches={accumulate}"
    whole = reference
    if accumulate > 1:
        whole = tmp_path / "whole"
        finish(whole, store, accumulation)
    run_dir = tmp_path / "run"
    batch = EPOCH if phase == "validation" else 18
    fault = {"batch": batch, "phase": phase, "kill": False}
    run = start(run_dir, store, accumulation, inject=[("Fail", fault)])
    assert run.wait() == 1 and "injected" in run.said()
    assert last(run_dir)["global_step"] == EXCEPTIONS[phase, accumulate]
    finish(run_dir, store, accumulation, "--ckpt_path", "last")
    tally(f"exception in {phase}, accumulation {accumulate}", [same_training(run_dir, whole)])


@pytest.mark.parametrize("step", [7, EPOCH, EPOCH + 3])
def test_a_run_that_is_limited_by_steps_resumes_too(store, tmp_path, tally, step):
    """Lightning counts the epochs of such a run differently."""
    common = ("--trainer.max_epochs=-1", "--trainer.max_steps=60")
    finish(tmp_path / "whole", store, *common)
    run_dir = tmp_path / "run"
    fault = {"batch": step + 1, "phase": "start", "kill": True}
    first = start(run_dir, store, *common, every_n_steps=1, inject=[("Fail", fault)])
    assert first.wait() == -9
    assert last(run_dir)["global_step"] == step
    finish(run_dir, store, *common, "--ckpt_path", "last")
    tally(f"resume at {step} of 60 steps", [same_training(run_dir, tmp_path / "whole")])


def documents(run_dir: Path, rank: int, epochs: int) -> list[list[str]]:
    """Documents that a rank trained, per epoch."""
    found: list[list[str]] = [[] for _ in range(epochs)]
    for epoch, _, *names in lines(run_dir / f"documents-{rank}.txt"):
        found[int(epoch)] += names
    return found


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("ranks") / "run"
    finish(run_dir, store, ranks=2, inject=[("Documents", {})])
    return run_dir


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_lost_ends_the_other(store, two_ranks, tmp_path, tally, rank, kill):
    """Nobody hangs; the first rank, if it lives, leaves the last step that all finished."""
    run_dir = tmp_path / "run"
    fault = {"batch": 18, "phase": "start", "kill": kill, "rank": rank}
    run = start(run_dir, store, ranks=2, inject=[("Fail", fault)])
    code = run.wait(120)
    wanted_code, wanted_step = (-9, 16) if kill and rank == 0 else (1, 17)
    saved = last(run_dir)["global_step"]
    problem = ""
    if (code, saved) != (wanted_code, wanted_step) or "killed by the test" in run.said():
        problem = f"exit code {code}, step {saved}: {run.said()[-800:]}"
    finish(run_dir, store, *RESUME, ranks=2)
    how = "kill -9" if kill else "exception"
    tally(f"{how} of rank {rank} of 2", [problem or same_training(run_dir, two_ranks)])


def test_every_epoch_trains_every_sample_once_on_one_rank_or_two(store, two_ranks, tmp_path, tally):
    finish(tmp_path / "run", store, inject=[("Documents", {})])
    alone = documents(tmp_path / "run", 0, 2)
    shares = [documents(two_ranks, rank, 2) for rank in range(2)]
    samples = sum(toy.split(number) == "train" for number in range(toy.SAMPLES))
    problems = []
    for epoch in range(2):
        together = shares[0][epoch] + shares[1][epoch]
        exact = len(set(together)) == len(together) == samples
        problems.append("" if exact and set(together) == set(alone[epoch]) else f"epoch {epoch}")
    assert alone[0] != alone[1]
    tally("every sample once per epoch, two ranks", problems)


@pytest.mark.short
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--trainer.devices=1", "world_size: checkpoint 2, this run 1"),
        (
            "--trainer.accumulate_grad_batches=2",
            "accumulate_grad_batches: checkpoint 1, this run 2",
        ),
        ("--data.max_tokens=50", "max_tokens: checkpoint 64, this run 50"),
        ("--data.seed=1", "seed: checkpoint 0, this run 1"),
    ],
)
def test_another_order_of_the_data_is_refused_with_the_reason(
    store, two_ranks, reference, tmp_path, tally, option, reason
):
    source = two_ranks if "devices" in option else reference
    shutil.copytree(source / "checkpoints", tmp_path / "run/checkpoints")
    run = start(tmp_path / "run", store, "--ckpt_path", "last", option)
    code, said = run.wait(), run.said()
    assert "Traceback" not in said
    tally(f"resume with {option[2:]}", ["" if code == 1 and reason in said else said[-500:]])
