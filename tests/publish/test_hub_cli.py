"""``python -m peagle fit`` as a user starts it, publishing to a Hub on loopback, and back again."""

import hashlib
import json
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import hub_fits
import pytest
import torch
from hub_fault_cases import FAULTS, RARE_FAULTS
from hub_fits import STEPS, peagle, write_config
from hub_runs import REPO, queued
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard, snapshot_download

from peagle.cli import run
from peagle.model.p_eagle import PEagleDrafter
from peagle.serve.contract import check_folder


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Where the first run puts its store, and the others find it."""
    return tmp_path_factory.mktemp("shared") / "store"


def environment(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1", **changes,
    }  # fmt: skip


@dataclass
class Published:
    hub: Hub
    run: Path
    folder: Path  # everything that the run and its surroundings have written
    ended: CompletedProcess


@pytest.fixture(scope="module")
def published(tmp_path_factory, store):
    """A run that also keeps its checkpoints on the Hub; its token is the canary."""
    folder = tmp_path_factory.mktemp("published")
    options = {"repo_id": REPO, "hub_strategy": "checkpoint", "always_push": True}
    config = write_config(folder / "run", store, **options)
    with Hub() as hub:
        ended = peagle("fit", "--config", config, **environment(hub, folder))
        yield Published(hub, folder / "run", folder, ended)


def test_a_fit_from_the_command_line_is_on_the_hub_when_it_ends(published):
    assert published.ended.returncode == 0, published.ended.stderr
    assert f"step {STEPS} is on {REPO}@main" in published.ended.stderr
    newest = published.hub.history(REPO)[0]
    run_id = json.loads((published.run / "provenance.json").read_text())["run_id"]
    assert newest.title.startswith(f"{run_id} step {STEPS} weights ")
    assert published.hub.repos[REPO].tags[f"step-{STEPS}"] == newest.oid
    assert published.hub.repos[REPO].private and queued(published.run) == []


SOURCES = {"config.json": "drafter", "model.safetensors": "drafter", "README.md": "card"}


def test_what_comes_back_from_the_hub_is_the_run_byte_for_byte_and_loads(published, tmp_path):
    folder = Path(snapshot_download(
        REPO, endpoint=published.hub.url, token=TOKEN, cache_dir=tmp_path, revision=f"step-{STEPS}"
    ))  # fmt: skip
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names.remove(".gitattributes")
    assert {*SOURCES, "provenance.json", "metrics/acceptance.json"} <= names
    for name in names:
        place = SOURCES.get(name, "card" if name.endswith(".png") else ".")
        ours, theirs = published.run / place / name, folder / name
        if name == "provenance.json" or name.startswith("metrics/"):
            # The run's own path is all that is cut out.
            assert theirs.read_text() == re.sub(r"/\S*/(?=[\w.]+)", "", ours.read_text()), name
        else:
            assert theirs.read_bytes() == ours.read_bytes(), name
    check_folder(folder)
    ours = PEagleDrafter.from_pretrained(published.run / "drafter").state_dict()
    back = PEagleDrafter.from_pretrained(folder).state_dict()
    assert ours.keys() == back.keys() and all(torch.equal(ours[key], back[key]) for key in ours)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    card = ModelCard.load(folder / "README.md")
    assert f"| Drafter weights, sha256 | `{weights}` |" in card.text
    assert f'"model": "{REPO}"' in card.text, "the serving line names the repository"


def test_the_token_is_nowhere_but_in_the_headers(published):
    files = [path for path in published.folder.rglob("*") if path.is_file()]
    assert {"last.ckpt", "config.yaml", "train.csv"} <= {path.name for path in files}
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in published.ended.stdout + published.ended.stderr
    assert len(published.hub.received) > 100_000
    assert TOKEN.encode() not in published.hub.received


def test_a_checkpoint_on_the_hub_goes_on_where_it_was_saved(published, store, tmp_path):
    """From step 2, as it lies on the branch, to the same drafter as the run that went through."""
    branch = published.hub.history(REPO, "ckpts")
    (early,) = [commit.oid for commit in branch if " step 2 " in commit.title]
    assert set(published.hub.content(REPO, "ckpts")) == {".gitattributes", "last.ckpt"}
    config = write_config(tmp_path / "run", store)
    ended = peagle(
        "fit", "--config", config, "--ckpt_path", f"hf://{REPO}/last.ckpt@{early}",
        **environment(published.hub, tmp_path),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert f"checkpoint hf://{REPO}/last.ckpt@{early}" in ended.stderr
    name = "drafter/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (published.run / name).read_bytes()
    assert len(hub_fits.losses(tmp_path / "run")) == STEPS - 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "words"),
    [
        (f"hf://{REPO}/last.ckpt@nowhere", "cannot be fetched: 404"),
        (f"hf://{REPO}/README.md@main", "more than tensors and plain"),
    ],
)
def test_what_is_no_checkpoint_on_the_hub_is_one_clear_sentence(
    published, tmp_path, address, words
):
    arguments = ("export", "--ckpt_path", address, "--out", tmp_path / "drafter")
    ended = peagle(*arguments, **environment(published.hub, tmp_path))
    assert ended.returncode == 1 and words in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "drafter").exists()


@pytest.mark.slow
def test_a_malformed_name_ends_the_run_before_anything_is_made(hub, tmp_path):
    config = write_config(tmp_path / "run", tmp_path / "store", repo_id="no-owner")
    ended = peagle("fit", "--config", config, **environment(hub, tmp_path))
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert "repo_id must be written owner/name, got 'no-owner'" in ended.stderr
    assert hub.requests == [] and not (tmp_path / "store").exists()


@pytest.mark.parametrize("form", ["--config={}", "--config {}", "--trainer.callbacks.token {}"])
def test_a_token_is_refused_before_anything_can_repeat_it(tmp_path, form):
    held = TOKEN
    if "config" in form:
        held = write_config(tmp_path / "run", tmp_path / "store", repo_id=REPO, token=TOKEN)
    with pytest.raises(ValueError, match="holds a Hub token: take it out") as refusal:
        run("fit", ["fit", *form.format(held).split()])
    assert TOKEN not in str(refusal.value)


def finish(*arguments, log: Path, **environment: str) -> tuple[int, float]:
    """Exit code of a forked command, and when it ended."""
    process = hub_fits.forked(*arguments, log=log, **environment)
    process.join(280)
    ended = time.time()
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode, ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store):
    """The same run without a Hub."""
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder / "run", store)
    code, _ = finish("fit", "--config", config, log=folder / "log")
    assert code == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS | RARE_FAULTS)
def test_a_fit_ends_as_without_a_hub_whatever_the_hub_does(
    hub, alone, store, tmp_path, fault, record_property
):
    case = (FAULTS | RARE_FAULTS)[fault]
    injected = hub.fault(case.route, **case.what)
    run, log = tmp_path / "run", tmp_path / "log"
    options = {"repo_id": REPO, "endpoint": hub.url, "publish_timeout": case.patience}
    config = write_config(run, store, **options)
    code, ended = finish("fit", "--config", config, log=log, **environment(hub, tmp_path))
    assert code == 0, log.read_text()
    waited = ended - (run / "card/README.md").stat().st_mtime  # the last that is not the Hub's
    record_property("seconds from the card to the exit", round(waited, 2))
    assert waited < case.patience + 5
    assert len(hub_fits.losses(run)) == STEPS and hub_fits.losses(run) == hub_fits.losses(alone)
    name = "drafter/model.safetensors"
    assert (run / name).read_bytes() == (alone / name).read_bytes()
    assert injected.met and len(hub.history(REPO)) == int(case.lands)
    said = f"python -m peagle publish --run {run} --repo_id {REPO}"
    assert (said in log.read_text()) == (not case.lands)
    hub.faults.clear()
    flush = ("publish", "--run", run, "--repo_id", REPO, "--endpoint", hub.url)
    code, _ = finish(*flush, log=log, **environment(hub, tmp_path))
    assert code == 0, log.read_text()
    (commit,) = hub.history(REPO)
    assert f" step {STEPS} " in commit.title and queued(run) == []
    assert hub.content(REPO)["model.safetensors"] == (run / name).read_bytes()


def said_on_the_card(content: dict[str, bytes]) -> tuple[str, int]:
    """The weights and the step that the card of a commit names."""
    card = content["README.md"].decode()
    sha = re.search(r"^\| Drafter weights, sha256 \| `(\w{64})` \|", card, flags=re.M)[1]
    step = re.search(r"^\| Steps \| (\d+) \|", card, flags=re.M)[1]
    return sha, int(step)


@pytest.mark.slow
def test_a_fit_that_is_killed_ten_times_publishes_every_save_once(hub, store, tmp_path):
    """Each life ends by kill -9 amid the requests of a publication; the last one finishes."""
    run, log, draw = tmp_path / "run", tmp_path / "log", random.Random(9)
    options = {"repo_id": REPO, "endpoint": hub.url, "hub_strategy": "every_save"}
    config = write_config(run, store, 1, always_push=True, **options)
    length = ("--trainer.max_steps", 40, "--trainer.max_epochs", -1)
    arguments = ("fit", "--config", config, "--ckpt_path", "last", *length)
    hub.fault("commit", hang=0.2, after=True)  # a wide window between done and answered
    owed, ends = set(), []
    for _ in range(10):
        process = hub_fits.forked(*arguments, log=log, **environment(hub, tmp_path))
        end = len(hub.requests) + draw.randint(4, 25)
        while len(hub.requests) < end and process.is_alive():
            time.sleep(0.005)
        assert process.is_alive(), log.read_text()
        process.kill()
        process.join()
        ends.append(hub.requests[-1][0])
        owed |= {step for step in queued(run) if step}
    code, _ = finish(*arguments, log=log, **environment(hub, tmp_path))
    assert code == 0 and queued(run) == [], log.read_text()
    assert len(set(ends)) > 2, "every kill came at the same moment"
    commits = hub.history(REPO)
    steps = [int(commit.title.split()[2]) for commit in commits]
    assert len(set(steps)) == len(steps), "a step was published twice"
    assert owed | {40} <= set(steps), "a step was lost"
    for commit, step in zip(commits, steps, strict=True):
        content = hub.content(REPO, commit.oid)
        sha = hashlib.sha256(content["model.safetensors"]).hexdigest()
        assert said_on_the_card(content) == (sha, step) and sha[:12] in commit.title
        assert json.loads(content["provenance.json"])["training"]["steps"] == step
