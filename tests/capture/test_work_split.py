"""Several processes capture into one store: the same store as one process makes, to the bit."""

import json
from dataclasses import replace

import pytest

from peagle.capture import extract as extract_module
from peagle.capture import generate as generate_module
from peagle.capture.capture import capture
from peagle.capture.config import CaptureConfig
from peagle.capture.prompts import PromptSource, load_prompts
from peagle.capture.work_split import WorkSplit
from peagle.store.index import SHARDS_PER_PROCESS, index_files
from peagle.store.reader import Store
from peagle.store.writer import StoreWriter
from peagle.target.target import TargetSource

TARGET = TargetSource("tiny")
CONFIG = CaptureConfig(
    prompts=[PromptSource("stdlib", limit=14)],
    max_new_tokens=12,
    batch_size=3,
    batch_tokens=100,
    greedy_share=0.6,
    val_share=0.3,
    shard_mb=1,
    dtype="float32",  # a processor without bf16 instructions takes five times as long in bf16
)


def part(text):
    return replace(CONFIG, part=text)


def contents(folder):
    """Samples in their order, with all that training reads of them."""
    return [(e.sample, e.tokens, e.supervised, e.split, e.hashes) for e in Store(folder).entries]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    capture(TARGET, CONFIG, folder)
    return folder


def test_samples_are_in_the_order_of_their_prompts(whole):
    store, tokenizer = Store(whole), TARGET.tokenizer()
    texts = [tokenizer.decode(store.read(i).input_ids) for i in range(len(store))]
    prompts = load_prompts(CONFIG.prompts[0])
    assert len(texts) == 14
    assert all(p.turns[0] in text for p, text in zip(prompts, texts, strict=True))


@pytest.mark.parametrize("order", ["0/2 1/2", "2/3 0/3 1/3", "1/2"])
def test_parts_make_the_store_that_one_process_makes(whole, tmp_path, order, capsys):
    *early, last = order.split()
    for text in early:
        capture(TARGET, part(text), tmp_path)
        with pytest.raises(ValueError, match="no store at"):
            Store(tmp_path)
        assert f"part {text} is done" in capsys.readouterr().out
    capture(TARGET, part(last), tmp_path)
    capture(TARGET, CONFIG, tmp_path)  # completes what one of two parts left, else finds it there
    assert contents(tmp_path) == contents(whole)
    assert not (tmp_path / "partial").exists() and not list(tmp_path.glob("*.tmp"))
    store = Store(tmp_path)
    assert len({store.read(i).input_ids.numpy().tobytes() for i in range(len(store))}) == 14
    shards = {
        int(path.stem.partition("-")[2]) // SHARDS_PER_PROCESS for path in index_files(tmp_path)
    }
    assert len(shards) == {"0/2 1/2": 2, "2/3 0/3 1/3": 3, "1/2": 2}[order]


class Killed(BaseException):
    pass


def kill_after(calls, function):
    """``function``, until a process would have been killed."""
    left = [calls]

    def call(*args):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return function(*args)

    return call


@pytest.mark.parametrize(
    ("place", "calls"),
    [("answering", 0), ("answering", 1), ("reading", 0), ("reading", 1), ("reading", 2)],
)
def test_a_part_that_is_killed_goes_on_and_the_store_is_the_same(
    whole, tmp_path, monkeypatch, place, calls
):
    module, name = {
        "answering": (generate_module, "answer_batch"),
        "reading": (extract_module, "extract_batch"),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, kill_after(calls, getattr(module, name)))
        with pytest.raises(Killed):
            capture(TARGET, replace(part("1/2"), shard_mb=0), tmp_path)
    if place == "answering":
        with open(tmp_path / "answers-1.jsonl", "a") as file:
            file.write('{"id": "torn')
    capture(TARGET, part("0/2"), tmp_path)
    capture(TARGET, part("1/2"), tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_batch_whose_answers_were_torn_apart_is_answered_as_before(whole, tmp_path, monkeypatch):
    """Sampled answers depend on all that are drawn together."""
    tmp_path.joinpath("partial").mkdir()
    for name in ("capture.json", "answers.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    lines = (whole / "answers.jsonl").read_bytes().splitlines(keepends=True)
    sampled = [i for i, line in enumerate(lines) if not json.loads(line)["greedy"]]
    kept = lines[: sampled[0] + 1]  # one of the three that were sampled together
    (tmp_path / "answers.jsonl").write_bytes(b"".join(kept) + lines[sampled[1]][:20])
    capture(TARGET, CONFIG, tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert sorted((tmp_path / "answers.jsonl").read_bytes().splitlines()) == sorted(
        (whole / "answers.jsonl").read_bytes().splitlines()
    )


def test_prompts_that_leave_no_room_are_not_asked_again(tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": "def a():"}, {"prompt": "x = 1\n" * 99}, {"prompt": "def b():"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(CONFIG, prompts=[PromptSource(str(path))], max_tokens=60, greedy_share=1.0)
    capture(TARGET, config, tmp_path / "store")
    assert "1 of 3 prompts are longer than max_tokens" in capsys.readouterr().out
    assert len(Store(tmp_path / "store")) == 2
    answers = (tmp_path / "store" / "answers.jsonl").read_text().splitlines()
    assert sorted(len(json.loads(line)["turns"]) for line in answers) == [0, 1, 1]


def test_equal_prompts_with_greedy_answers_make_one_sample(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "def a():"}\n{"prompt": "def b():"}\n{"prompt": "def a():"}\n')
    config = replace(CONFIG, prompts=[PromptSource(str(path))], greedy_share=1.0)
    capture(TARGET, config, tmp_path / "store")
    assert len(Store(tmp_path / "store")) == 2


@pytest.mark.parametrize("running", ["0/2", "1/2", None])
def test_two_processes_never_capture_the_same(tmp_path, running):
    """The lock is held by this process, on a file of its own opening."""
    with WorkSplit.parse(running).lock(tmp_path / "partial"):
        same = part(running)
        with pytest.raises(ValueError, match="another process is capturing into"):
            capture(TARGET, same, tmp_path)
        with pytest.raises(ValueError, match="another process is capturing into"):
            capture(TARGET, CONFIG, tmp_path)
    shares = [WorkSplit(index, 2).lock(tmp_path / "partial") for index in range(2)]
    with shares[0], shares[1]:
        pass


@pytest.mark.parametrize("text", ["0/2", "1/2"])
def test_no_part_begins_while_all_are_captured(tmp_path, text):
    with WorkSplit.parse(None).lock(tmp_path / "partial"):
        with pytest.raises(ValueError, match="another process is capturing into"):
            capture(TARGET, part(text), tmp_path)


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"part must be I/N .* \(0/2, 1/2\), got"):
        WorkSplit.parse(text)


def test_processes_share_the_batches_and_leave_none_out():
    batches = list("abcdefg")
    shares = [WorkSplit(i, 3).share(batches) for i in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    assert WorkSplit.parse(None).share(batches) == batches


def test_parts_of_other_batches_complete_nothing(tmp_path):
    assert not WorkSplit(0, 2).mark_done(tmp_path, 32)
    assert not WorkSplit(1, 2).mark_done(tmp_path, 16)
    assert WorkSplit(1, 2).mark_done(tmp_path, 32)


def test_a_writer_leaves_the_unfinished_shards_of_others_alone(tmp_path):
    other = tmp_path / f"shard-{SHARDS_PER_PROCESS}.safetensors.tmp"
    other.write_bytes(b"being written")
    own = tmp_path / "shard-00003.safetensors.tmp"
    own.write_bytes(b"left by a kill")
    StoreWriter(tmp_path, shard_bytes=1)
    assert other.exists() and not own.exists()
