"""``--store hf://...`` as a user gives it: what is refused, and a whole fit from the Hub."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_fits import ROOT, STEPS, losses, peagle, write_config
from hub_server import TOKEN, Hub
from hub_stores import ADDRESS, NAME, fetched, put_store
from random_parts import make_manifest

from peagle.capture.config import CaptureConfig
from peagle.capture.identity import wanted_manifest
from peagle.capture.prompts import PromptSource
from peagle.cli import run
from peagle.target.target import TargetSource

quiet = pytest.mark.filterwarnings("ignore")  # of Lightning and jsonargparse


@quiet
@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("main", r"tiny@\w{40} is not for this run: the store was captured with fingerprint ="),
        ("v9", "tiny@v9 cannot be fetched: 404"),
    ],
)
def test_a_store_of_another_target_or_revision_is_refused(
    own_hub, random_store, tmp_path, monkeypatch, revision, words
):
    monkeypatch.setattr(sys, "argv", ["peagle"])
    put_store(own_hub, random_store)
    config = write_config(tmp_path / "run", ADDRESS.replace("main", revision))
    with pytest.raises(ValueError, match=words) as raised:
        run("fit", ["fit", "--config", str(config)])
    assert TOKEN not in str(raised.value) and fetched(own_hub) == []


@quiet
def test_a_store_of_other_prompts_is_refused_with_the_difference(
    own_hub, random_store, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["peagle"])
    settings = {"max_new_tokens": 12, "max_tokens": 160, "val_share": 0.3}
    config = CaptureConfig(prompts=[PromptSource("stdlib", limit=24)], **settings)
    wanted_manifest(TargetSource("tiny"), config).write(random_store)
    made = json.dumps({"made_with": config.made_with() | {"greedy_share": 0.123}})
    (random_store / "capture.json").write_text(made)
    put_store(own_hub, random_store)
    with pytest.raises(ValueError, match=r"not for this run: .* made with greedy_share = 0\.123"):
        run("fit", ["fit", "--config", str(write_config(tmp_path / "run", ADDRESS))])


@quiet
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit", r"there is no store at hf://.*, and none is captured there: capture into a folder"),
        ("capture", "a store is captured into a folder: give --store FOLDER"),
    ],
)
def test_nothing_is_captured_into_the_hub(own_hub, tmp_path, monkeypatch, command, words):
    monkeypatch.setattr(sys, "argv", ["peagle"])
    monkeypatch.chdir(tmp_path)
    own_hub.put(f"datasets/{NAME}", {"README.md": b"# Nothing yet"})
    config = write_config(tmp_path / "run", ADDRESS)
    with pytest.raises(ValueError, match=words):
        run(command, [command, "--config", str(config)])
    assert not (tmp_path / "hf:").exists() and not (tmp_path / "run").exists()


@quiet
def test_a_plan_counts_the_store_on_the_hub(own_hub, random_store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peagle"])
    put_store(own_hub, random_store)
    size = sum(path.stat().st_size for path in random_store.iterdir())
    config = write_config(tmp_path / "run", ADDRESS)
    run("plan", ["plan", "--config", str(config), "--seconds", "0.01"])
    said = capsys.readouterr().out
    assert "24 conversations (counted in the finished store)" in said
    assert f"{size / 1000:.3g} kB in {ADDRESS[:-4]}" in said and fetched(own_hub) == []


def test_the_manifest_of_these_tests_is_another_targets():
    assert make_manifest().fingerprint != TargetSource("tiny").fingerprint()


def settings_of(hub: Hub, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of many small shards, as a fit from the command line has made it, beside its run."""
    folder = tmp_path_factory.mktemp("made")
    ended = peagle("fit", "--config", write_config(folder / "run", folder / "store"), *SHARDS)
    assert ended.returncode == 0, ended.stderr
    assert len(list((folder / "store").glob("shard-*.parquet"))) > 4
    return folder


PROMPTS = "[{source: stdlib, split: train, limit: 96}]"
SHARDS = ("--capture.shard_mb", 1, "--capture.prompts", PROMPTS)
DRAFTER = "drafter/model.safetensors"


def equal_drafters(ours: Path, theirs: Path) -> bool:
    return (ours / DRAFTER).read_bytes() == (theirs / DRAFTER).read_bytes()


@pytest.mark.slow
def test_a_fit_from_what_hf_upload_put_there_is_the_one_from_the_folder(made, tmp_path):
    """Capture and fit, the README's line of ``hf upload``, and a fit on another machine."""
    run_dir = tmp_path / "afar/run"
    run_dir.parent.mkdir()
    with Hub() as hub:
        line = f"hf upload {NAME} {made}/store tiny --repo-type dataset --private"
        program = [str(Path(sys.executable).with_name("hf")), *line.split()[1:]]
        program += ["--exclude", "answers*.jsonl"]
        environment = os.environ | settings_of(hub, tmp_path)
        subprocess.run(program, env=environment, check=True, capture_output=True, timeout=120)
        names = {Path(name).name for name in hub.content(f"datasets/{NAME}")} - {".gitattributes"}
        assert names == {path.name for path in (made / "store").iterdir()} - {"answers.jsonl"}
        small = ("--data.cache_gb", 0.004, "--data.num_workers", 2)
        config = write_config(run_dir, ADDRESS)
        settings = settings_of(hub, run_dir.parent)
        ended = peagle("fit", "--config", config, *SHARDS, *small, **settings)
        assert ended.returncode == 0, ended.stderr
        commit = hub.repos[f"datasets/{NAME}"].branches["main"]
    assert f"store {ADDRESS[:-4]}{commit}" in ended.stderr
    assert len(losses(run_dir)) == STEPS and losses(run_dir) == losses(made / "run")
    assert equal_drafters(run_dir, made / "run")
    known = json.loads((run_dir / "provenance.json").read_text())["data"]["store"]
    assert known == f"{ADDRESS[:-4]}{commit}"
    files = [path for path in run_dir.parent.rglob("*") if path.is_file()]
    assert any(path.match("shards/*/shard-00000.safetensors") for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in ended.stdout + ended.stderr


@pytest.mark.slow
def test_two_ranks_share_one_cache_and_train_as_from_the_folder(made, tmp_path):
    asked = ("--evaluation.prompts", PROMPTS.replace("96", "2"), "--evaluation.batch_size", 1)
    ranks = (*SHARDS, *asked, "--trainer.devices", 2, "--trainer.strategy", "ddp")
    local, afar = tmp_path / "local", tmp_path / "afar"
    ended = peagle("fit", "--config", write_config(local, made / "store"), *ranks)
    assert ended.returncode == 0, ended.stderr
    with Hub() as hub:
        put_store(hub, made / "store")
        config = write_config(afar, ADDRESS)
        ended = peagle("fit", "--config", config, *ranks, **settings_of(hub, tmp_path))
        assert ended.returncode == 0, ended.stderr
        assert hub.count("info") == 1, "a branch is asked for by the first process alone"
        assert len(fetched(hub)) == len(set(fetched(hub))) > 4
    assert losses(afar) == losses(local) and equal_drafters(afar, local)


@pytest.mark.slow
def test_a_fit_that_is_killed_amid_its_downloads_goes_on_and_leaves_nothing(made, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    config = write_config(run_dir, ADDRESS, 1)
    command = [sys.executable, "-m", "peagle", "fit", "--config", str(config), *map(str, SHARDS)]
    command += ["--ckpt_path", "last", "--data.cache_gb", "0.004", "--data.num_workers", "2"]
    with Hub() as hub:
        put_store(hub, made / "store")
        hub.fault("resolve", hang=0.2, where=r"GET .*shard-\d+\.safetensors")
        settings = os.environ | settings_of(hub, tmp_path) | {"OMP_NUM_THREADS": "1"}
        for kill_at in (1, 4, 9):
            hub.requests.clear()
            with log.open("a") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=settings, stdout=file, stderr=file
                )
            while len(fetched(hub)) < kill_at and process.poll() is None:
                time.sleep(0.005)
            assert process.poll() is None, log.read_text()
            process.kill()
            process.wait()
        arriving = tmp_path / "hf/assets/peagle/hub/stores/arriving"
        assert list(arriving.iterdir()), "every kill came between two downloads"
        subprocess.run(command, cwd=ROOT, env=settings, check=True, capture_output=True)
    assert not list(arriving.iterdir()) and equal_drafters(run_dir, made / "run")
    assert not list(tmp_path.rglob("*.incomplete"))
