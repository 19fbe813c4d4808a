"""Every usual kind of file, and what is wrong with one."""

import gzip
import json
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from peagle.capture.prompts import PromptSource, load_prompts, prompt_set_hash
from peagle.capture.rows import is_local

ROWS = [{"prompt": "Hi"}, {"prompt": "two\nlines"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'prompt,note\nHi,N/A\n"two\nlines",\n'
WRITERS = {
    "set.jsonl": lambda path: path.write_text(LINES),
    "set.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "set.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_text(LINES),
    "set.json.gz": lambda path: path.write_bytes(
        gzip.compress(json.dumps({"data": ROWS}).encode())
    ),
    "set.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "set.csv": lambda path: path.write_text(CSV),
    "set.tsv": lambda path: path.write_text(CSV.replace(",", "\t")),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_any_kind_is_read_and_known_by_its_content(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    source = PromptSource(f"~/{name}", label="set")
    prompts = load_prompts(source)
    assert [prompt.turns for prompt in prompts] == [("Hi",), ("two\nlines",)]
    assert prompts[1].place in (f"{tmp_path / name}, line 2", f"{tmp_path / name}, row 2")
    WRITERS["set.jsonl"](tmp_path / "same.jsonl")
    same = PromptSource(str(tmp_path / "same.jsonl"), label="set")
    assert prompt_set_hash(source) == prompt_set_hash(same)
    assert PromptSource(name).name == name.partition(".")[0] and not source.on_hub


def test_a_folders_files_may_have_different_columns_and_none_is_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "Who?", "level": 1}\n')
    (tmp_path / "LICENSE.txt").touch()
    source = PromptSource(str(tmp_path))
    assert [prompt.turns for prompt in load_prompts(source)] == [("Hi",), ("Who?",)]
    (tmp_path / "c.csv").write_text("prompt\nWhat?\n")
    with pytest.raises(ValueError, match=r"holds c\.csv, which .* would be skipped"):
        load_prompts(source)


def test_a_split_that_a_saved_data_set_does_not_have_is_refused(tmp_path):
    rows = Dataset.from_list([{"prompt": "Hi"}])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "several")
    for name, words in (("one", "has no split"), ("several", "splits are train, and 'test' is")):
        assert load_prompts(PromptSource(str(tmp_path / name)))[0].turns == ("Hi",)
        with pytest.raises(ValueError, match=words):
            load_prompts(PromptSource(str(tmp_path / name), split="test"))


def test_a_tool_in_parquet_has_no_parameters_of_the_other_rows_tools(tmp_path):
    rows = []
    for name, parameter in (("look_up", "word"), ("add", "number")):
        properties = {parameter: {"type": "string"}}
        tool = {"name": name, "parameters": {"type": "object", "properties": properties}}
        rows.append({"prompt": "Hi", "tools": [{"type": "function", "function": tool}]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    prompts = load_prompts(PromptSource(str(tmp_path / "set.parquet")))
    assert [list(prompt.tools) for prompt in prompts] == [row["tools"] for row in rows]


def test_a_set_with_times_in_its_messages_is_known_by_its_content(tmp_path):
    hashes = set()
    for year in (2023, 2023, 2024):  # WildChat has a time in every answer
        said = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello", "timestamp": datetime(year, 4, 9)},
        ]
        pq.write_table(pa.Table.from_pylist([{"conversation": said}]), tmp_path / "set.parquet")
        hashes.add(prompt_set_hash(PromptSource(str(tmp_path / "set.parquet"))))
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "x", "m": ' + b"[" * 100_000, "line 1 is nested too deep"),
        ("a.json", b'[{"prompt": "x"},\n7 8]', r"a\.json is not JSON .* line 2 column 3"),
        ("a.json", b"7", r"a\.json must hold a list of objects, not 7"),
        ("a.jsonl.gz", b"junk", "cannot be unpacked"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "cannot be unpacked"),
        ("a.parquet", b"junk", "cannot be read after 0 rows"),
        ("a.csv", b"prompt,note\nx\n", "row 1 has not as many cells"),
        ("a.csv", b'prompt\n"x\n', "is not CSV"),
        ("a.csv", b"prompt,prompt\nx,y\n", "has two columns 'prompt'"),
        ("a.xlsx", b"", r"must end in \.jsonl"),
    ],
)
def test_a_damaged_file_is_one_sentence_with_its_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load_prompts(PromptSource(str(tmp_path / name)))
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["w/d.jsonl.gz", "no.parquet", "./no", "a/b/c", "~/no", "n.zip"])
def test_what_looks_like_a_path_is_never_looked_for_on_the_hub(source):
    assert is_local(source)
    with pytest.raises(ValueError, match=r"prompt file .* does not exist"):
        load_prompts(PromptSource(source))


def test_a_hub_id_is_no_path():
    assert not is_local("org/set") and not is_local("org/set.v1")
