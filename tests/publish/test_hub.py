"""Publishing against a real HTTP server with the real client; nothing of the client is replaced."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from card_runs import full_run
from hub_runs import PUBLISHED, REPO, finish_run, publish, queued
from hub_server import TOKEN
from huggingface_hub import ModelCard, snapshot_download

from peagle.callbacks.hub import HubPublisher
from peagle.card.card import CardOptions, write_card
from peagle.publish.allowed_files import files_to_publish
from peagle.publish.publish import enqueue_run
from peagle.publish.publish import publish as publish_command
from peagle.publish.queue import MAIN, add_entry
from peagle.publish.sender import Sender
from peagle.publish.upload import Destination


@pytest.mark.parametrize("part_size", [None, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_published_run_comes_back_byte_for_byte(hub, tmp_path, part_size):
    hub.storage.part_size = part_size
    sha = finish_run(tmp_path / "run", step=40)
    result = publish(tmp_path / "run", hub.url)
    assert result.complete and queued(tmp_path / "run") == []
    (commit,) = hub.history(REPO)
    assert re.fullmatch(f"run-1 step 40 weights {sha[:12]} files [0-9a-f]{{12}}", commit.title)
    assert hub.repos[REPO].tags == {"step-40": commit.oid}
    assert hub.repos[REPO].private
    folder = snapshot_download(
        REPO, revision="step-40", endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache"
    )
    files = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.*")}
    assert files - {".gitattributes"} == PUBLISHED
    places = {"config.json": "drafter", "model.safetensors": "drafter", "README.md": "card"}
    for name in PUBLISHED - {"accuracy.png"}:
        source = tmp_path / "run" / places.get(name, ".") / name
        assert (Path(folder) / name).read_bytes() == source.read_bytes()


def test_what_a_library_prints_in_the_sending_process_is_no_event(hub, tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library/sitecustomize.py").write_text("print('welcome')\nprint('{...}')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "library"))
    finish_run(tmp_path / "run", step=1)
    result = publish(tmp_path / "run", hub.url)
    assert result.complete and [commit["step"] for commit in result.sent] == [1]


def test_only_listed_regular_files_reach_the_hub(hub, tmp_path):
    finish_run(tmp_path, step=1)
    (tmp_path / "secret").write_text("not for anybody")
    for folder in ("drafter", "card", "metrics", "."):
        for name in (
            ".env",
            "optimizer.pt",
            "last.ckpt",
            "notes.txt",
            "pickle.bin",
            ".hidden.json",
        ):
            (tmp_path / folder / name).write_text("not for anybody")
    for link in ("drafter/tokenizer.json", "metrics/bench.json", "card/plot.png"):
        (tmp_path / link).symlink_to(tmp_path / "secret")
    (tmp_path / "drafter/merges.txt").mkdir()
    os.mkfifo(tmp_path / "metrics/pipe.json")
    assert publish(tmp_path, hub.url).complete
    assert set(hub.content(REPO)) == PUBLISHED | {".gitattributes"}
    assert b"not for anybody" not in hub.received


def test_no_folder_of_the_trainer_is_published(hub, tmp_path):
    finish_run(tmp_path, step=1)
    record = {"run_id": "run-1", "step": 1, "command": "fit --target /home/me/llama", "url":
              "https://a.b/c", "target": {"name_or_path": "/home/me/llama"}}  # fmt: skip
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    (tmp_path / "metrics/bench.json").write_text(json.dumps({"drafter": "/home/me/run/drafter"}))
    assert publish(tmp_path, hub.url).complete
    pushed = hub.content(REPO)
    sent = json.loads(pushed["provenance.json"])
    assert sent["target"]["name_or_path"] == "llama" and sent["url"] == "https://a.b/c"
    assert json.loads(pushed["metrics/bench.json"]) == {"drafter": "drafter"}
    assert b"/home/me" not in hub.received
    assert json.loads((tmp_path / "provenance.json").read_text()) == record  # ours stays whole


def test_a_linked_folder_is_not_followed(hub, tmp_path):
    finish_run(tmp_path, step=1)
    (tmp_path / "metrics").rename(tmp_path / "elsewhere")
    (tmp_path / "metrics").symlink_to(tmp_path / "elsewhere")
    assert publish(tmp_path, hub.url).complete
    assert not [name for name in hub.content(REPO) if name.startswith("metrics/")]


def test_publishing_again_or_twice_at_once_makes_no_second_commit(hub, tmp_path):
    finish_run(tmp_path, step=1)
    hub.fault("commit", hang=0.5, after=True)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: publish(tmp_path, hub.url), range(2)))
    assert [result.complete for result in results] == [True, True]
    repo = hub.repos[REPO]
    for number in range(30):  # others' commits push ours to the history's second page
        hub.add_commit(repo, "main", f"edit {number}", "", repo.at("main").files)
    assert publish(tmp_path, hub.url).complete
    assert sum("step 1 " in commit.title for commit in hub.history(REPO)) == 1


def test_what_waits_is_not_added_to_the_queue_again(tmp_path):
    finish_run(tmp_path, step=1)
    entries = [enqueue_run(tmp_path, tmp_path / "hub_spool") for _ in range(3)]
    assert entries[0] == entries[1] == entries[2] and queued(tmp_path) == [1]
    (tmp_path / "metrics/bench.json").write_text('{"rows": []}')
    assert enqueue_run(tmp_path, tmp_path / "hub_spool") != entries[0]
    assert queued(tmp_path) == [1, 1]


def test_a_later_publication_leaves_no_figures_of_other_weights(hub, tmp_path):
    finish_run(tmp_path, step=1)
    assert publish(tmp_path, hub.url).complete
    finish_run(tmp_path, step=2)
    (tmp_path / "metrics/validate.json").rename(tmp_path / "metrics/acceptance.json")
    assert publish(tmp_path, hub.url).complete
    assert {name for name in hub.content(REPO) if name.startswith("metrics/")} == {
        "metrics/acceptance.json"
    }
    assert "metrics/validate.json" in hub.content(REPO, "step-1")


def test_figures_of_other_weights_are_left_out_by_name(tmp_path, capsys):
    finish_run(tmp_path, step=1)
    path = tmp_path / "metrics/validate.json"
    assert files_to_publish(tmp_path)["metrics/validate.json"] == path
    path.write_text(json.dumps({"provenance": {"weights_sha256": "0"}, "rows": []}))
    assert "metrics/validate.json" not in files_to_publish(tmp_path)
    assert f"{path} is left out" in capsys.readouterr().err


def test_a_save_that_a_killed_run_makes_again_is_not_published_again(hub, tmp_path):
    """It has the same weights under another date; a finished run's card may change."""
    sender = Sender(tmp_path / "hub_spool", Destination(REPO, True, None, hub.url))
    for date in ("before the kill", "after it"):
        finish_run(tmp_path, step=2)
        (tmp_path / "metrics/validate.json").write_text(json.dumps({"rows": [], "date": date}))
        note = {"run_id": "run-1", "step": 2, "channel": MAIN, "final": False}
        add_entry(sender.queue, files_to_publish(tmp_path), **note, transfer=shutil.copyfile)
        assert sender.send_all(60.0).complete
    (commit,) = hub.history(REPO)
    assert b"before the kill" in hub.content(REPO)["metrics/validate.json"]
    assert hub.repos[REPO].tags == {"step-2": commit.oid} and queued(tmp_path) == []


@pytest.mark.slow
def test_a_richer_card_of_the_same_step_is_published_and_the_first_tag_stays(hub, tmp_path):
    finish_run(tmp_path, step=1)
    assert publish(tmp_path, hub.url).complete
    with (tmp_path / "card/README.md").open("a") as card:
        card.write("measured later\n")
    assert publish(tmp_path, hub.url).complete
    second, first = hub.history(REPO)
    assert hub.repos[REPO].tags == {"step-1": first.oid, f"step-1-{second.oid[:7]}": second.oid}
    assert b"measured later" in hub.content(REPO)["README.md"]


def test_a_card_that_names_a_folder_names_the_repository_once_it_is_published(hub, tmp_path):
    run = full_run(tmp_path)
    written = CardOptions(license="Our Own 1.0", base_model_relation="finetune")
    write_card(run, run / "drafter", run / "card", options=written)
    publish_command(run, REPO, endpoint=hub.url)
    card = ModelCard(hub.content(REPO)["README.md"].decode())
    assert card.text.count(f'"model": "{REPO}"') == 1 and "./drafter" not in card.text
    assert (card.data.license, card.data["license_name"]) == ("other", "our-own-1.0")
    assert card.data["base_model_relation"] == "finetune"
    with (run / "drafter/model.safetensors").open("ab") as weights:
        weights.write(b"changed")
    with pytest.raises(ValueError, match="other weights"):
        publish_command(run, REPO, endpoint=hub.url)
    assert len(hub.history(REPO)) == 1


def test_a_card_names_the_repository_of_the_last_publish(hub, tmp_path):
    run = full_run(tmp_path)
    write_card(run, run / "drafter", run / "card")
    with pytest.raises(ValueError, match="403"):
        publish_command(run, "alcie/drafter", endpoint=hub.url)
    with (run / "card/README.md").open("a") as card:
        card.write("written by hand\n")
    publish_command(run, REPO, endpoint=hub.url)
    text = hub.content(REPO)["README.md"].decode()
    assert "alcie" not in text and text.count(f'"model": "{REPO}"') == 1
    assert text.endswith("written by hand\n")


def test_another_branch_is_made_and_main_stays_as_it_was(hub, tmp_path):
    finish_run(tmp_path, step=1)
    assert publish(tmp_path, hub.url, revision="candidates", private=False).complete
    assert set(hub.content(REPO, "candidates")) == PUBLISHED | {".gitattributes"}
    assert set(hub.content(REPO)) == {".gitattributes"}
    assert not hub.repos[REPO].private


def test_a_dry_run_writes_and_names_everything_and_sends_nothing(hub, tmp_path):
    finish_run(tmp_path, step=1)
    result = publish(tmp_path, hub.url, dry_run=True)
    (folder,) = (tmp_path / "hub_dry_run").iterdir()
    written = {path.relative_to(folder / "files").as_posix() for path in folder.rglob("files/**/*")}
    assert {name for name in written if "." in name} == PUBLISHED
    assert all(any(name in line for line in result.planned) for name in PUBLISHED)
    assert hub.requests == [] and queued(tmp_path) == []


SPOILS = {
    "card of other weights": ("drafter/model.safetensors", "other", "other weights"),
    "card of another step": ("provenance.json", '{"run_id": "run-1", "step": 2}', "other steps"),
    "card of another run": ("provenance.json", '{"run_id": "run-2", "step": 1}', "other run"),
    "no card": ("card/README.md", None, "goes out with its card"),
    "no config": ("drafter/config.json", None, "no config.json"),
    "no step": ("provenance.json", '{"step": "many"}', "after how many steps"),
    "our token": ("metrics/validate.json", f'"{TOKEN}"', "contains a token"),
    "a token": (
        "provenance.json",
        json.dumps({"run_id": "run-1", "step": 1, "a": "hf_" + "x" * 34}),
        "contains a t",
    ),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_run_that_must_not_be_published_is_refused_in_one_sentence(hub, tmp_path, spoil):
    path, content, said = SPOILS[spoil]
    finish_run(tmp_path, step=1)
    (tmp_path / "metrics/train.csv").unlink()
    (tmp_path / path).unlink()
    if content is not None:
        (tmp_path / path).write_text(content)
    with pytest.raises(ValueError, match=said):
        publish(tmp_path, hub.url)
    assert hub.requests == [] and queued(tmp_path) == []


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "options",
    [
        {"repo_id": "no-owner"},
        {"repo_id": "a/b/c"},
        {"repo_id": "alice/dra fter"},
        {"repo_id": f"alice/{TOKEN}"},
        {"repo_id": REPO, "endpoint": f"http://user:{TOKEN}@127.0.0.1"},
        {"repo_id": REPO, "endpoint": "http://user:password@127.0.0.1"},
        {"repo_id": REPO, "revision": TOKEN},
        {"repo_id": REPO, "revision": "ckpts"},
        {"repo_id": REPO, "hub_strategy": "sometimes"},
        {"repo_id": REPO, "publish_timeout": 0},
    ],
)
def test_a_malformed_setting_or_a_token_in_one_is_refused(options):
    with pytest.raises(ValueError) as refusal:
        HubPublisher(**options)
    assert TOKEN not in str(refusal.value)


def test_there_is_no_setting_for_a_token():
    with pytest.raises(TypeError, match="token"):
        HubPublisher(REPO, token=TOKEN)
