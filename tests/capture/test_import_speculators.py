"""Hidden states in speculators' files become a store, or one sentence says why they cannot."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from peagle.capture.capture import capture
from peagle.capture.config import CaptureConfig
from peagle.capture.identity import wanted_manifest
from peagle.capture.prompts import PromptSource
from peagle.plan.forecast import forecast
from peagle.store.reader import Store
from peagle.target.target import TargetSource

TARGET = TargetSource("tiny")
LAYERS = (2, 4, 5)
TEXTS = ["def close(self):\n    return 1", "x = 2", "import os\n\nprint(os.name)", "y = 3"]


@pytest.fixture(scope="module")
def model():
    return TARGET.model(dtype=torch.float32, device="cpu")


@pytest.fixture
def folder(tmp_path, model):
    """Written as speculators 0.9 does: ``save_to_disk``, and a file per row, all layers in one."""
    tokenizer, rows = TARGET.tokenizer(), []
    (tmp_path / "data" / "hidden_states").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        ids, seen = tokenizer(text, return_tensors="pt")["input_ids"], []
        # transformers' last state is normed: take it from what the norm is given
        hook = model.model.norm.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0][0])
        )
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
        hook.remove()
        layers = torch.stack([*(states[k][0] for k in LAYERS), seen[0]], 1)
        save_file(
            {"token_ids": ids[0], "hidden_states": layers.bfloat16()},
            tmp_path / "data" / "hidden_states" / f"hs_{i}.safetensors",
        )
        mask = torch.ones_like(ids[0])
        mask[0] = 0
        rows.append({"input_ids": ids[0], "loss_mask": mask if i != 3 else mask * 0,
                     "seq_len": len(mask)})  # fmt: skip
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    Dataset.from_dict(columns).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


def config(folder, **changes):
    settings = {"layer_ids": list(LAYERS), "dtype": "float32", "val_share": 0.3, **changes}
    return CaptureConfig(prompts=[PromptSource("stdlib")], speculators=str(folder), **settings)


def test_every_row_becomes_the_sample_that_its_file_holds(folder, tmp_path, capsys):
    capture(TARGET, config(folder), tmp_path / "store")
    store = Store(tmp_path / "store")
    assert len(store) == 3 and "1 rows have nothing to train on" in capsys.readouterr().err
    for i in range(3):
        sample = store.read(i)
        written = load_file(folder / "hidden_states" / f"hs_{i}.safetensors")
        assert torch.equal(sample.input_ids, written["token_ids"])
        states = written["hidden_states"]
        assert torch.equal(sample.aux, torch.cat([states[:, 0], states[:, 1], states[:, 2]], -1))
        assert torch.equal(sample.final, states[:, 3])
        assert sample.loss_mask.tolist() == [False] + [True] * (len(sample.input_ids) - 1)
    assert (tmp_path / "store" / "target.safetensors").exists()
    capture(TARGET, config(folder), tmp_path / "store")  # finds it complete
    moved = folder.rename(tmp_path / "moved")
    capture(TARGET, config(moved), tmp_path / "store")  # the same data at another place
    with pytest.raises(ValueError, match=r"made with speculators = '\w+', and this"):
        capture(TARGET, config("elsewhere"), tmp_path / "store")


def test_data_prepared_anew_at_the_same_place_are_other_data(folder):
    before = config(folder).answers_hash()
    rows = Dataset.load_from_disk(folder).to_dict()
    rows["input_ids"] = [ids[::-1] for ids in rows["input_ids"]]
    Dataset.from_dict(rows).save_to_disk(folder)
    assert config(folder).answers_hash() != before


def test_a_plan_counts_what_is_going_to_be_converted(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    wanted = wanted_manifest(TARGET, config(folder))
    plan = forecast(TARGET, config(f"~/{folder.name}"), wanted, tmp_path / "store", answers=0)
    capture(TARGET, config(folder), tmp_path / "store")
    store = Store(tmp_path / "store")
    silent = len(TARGET.tokenizer()(TEXTS[3])["input_ids"])  # of the row that is left out
    assert plan.tokens == sum(entry.tokens for entry in store.entries) + silent
    assert plan.supervised == sum(entry.supervised for entry in store.entries)
    size = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    assert plan.bytes == pytest.approx(size, rel=0.05)


def test_a_row_without_hidden_states_is_left_out_and_counted(folder, tmp_path, capsys):
    (folder / "hidden_states" / "hs_1.safetensors").unlink()
    capture(TARGET, config(folder), tmp_path / "store")
    assert "1 of 4 rows have no hidden states" in capsys.readouterr().out
    assert len(Store(tmp_path / "store")) == 2


def rewrite(folder, number, change):
    path = folder / "hidden_states" / f"hs_{number}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


def drop_the_last_layer(folder, model):
    rewrite(folder, 0, lambda t: t.update(hidden_states=t["hidden_states"][:, :3]))


def norm_the_last_layer(folder, model):
    def change(tensors):
        with torch.no_grad():
            tensors["hidden_states"][:, 3] = model.model.norm(
                tensors["hidden_states"][:, 3].float()
            )

    rewrite(folder, 0, change)


def exchange_layers(folder, model):
    rewrite(folder, 0, lambda t: t.update(hidden_states=t["hidden_states"][:, [1, 0, 2, 3]]))


def quantize(folder, model):
    change = {"dtype": torch.float8_e4m3fn}
    rewrite(folder, 1, lambda t: t.update(hidden_states=t["hidden_states"].to(**change)))


def change_a_token(folder, model):
    rewrite(folder, 1, lambda t: t["token_ids"].__setitem__(1, 7))


def lose_the_tokens(folder, model):
    rewrite(folder, 1, lambda t: t.pop("token_ids"))


def truncate(folder, model):
    path = folder / "hidden_states" / "hs_1.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def lose_the_mask(folder, model):
    Dataset.from_dict({"input_ids": [[1, 2]]}).save_to_disk(folder)


def lose_the_data_set(folder, model):
    for path in folder.glob("*.json"):
        path.unlink()


def lose_every_file(folder, model):
    for path in folder.glob("hidden_states/*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_the_last_layer, r"hs_0.* holds \[\d+, 3, \d+\] .*not \[\d+, 4, .*before the final"),
        (norm_the_last_layer, r"hs_0.*: layer 6 is off by .* after the final norm, from which"),
        (exchange_layers, r"hs_0.*: layer 2 is off by .*are these the target and the layer_ids"),
        (quantize, r"hs_1.* holds .*float8_e4m3fn, not .* of 16 bits"),
        (change_a_token, r"hs_1.* has other tokens than its row"),
        (lose_the_tokens, r"hs_1.* lacks token_ids"),
        (truncate, r"hs_1.* cannot be read"),
        (lose_the_mask, r"the data set .* has no column loss_mask"),
        (lose_the_data_set, r"is not a data set that speculators prepared: its loss mask"),
        (lose_every_file, r"has no file hs_0"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_one_sentence_with_the_file(
    folder, tmp_path, model, damage, words
):
    damage(folder, model)
    with pytest.raises(ValueError, match=words):
        capture(TARGET, config(folder), tmp_path / "store")
    with pytest.raises(ValueError, match="no store at"):
        Store(tmp_path / "store")


def test_parts_convert_the_rows_of_one_folder_into_the_same_store(folder, tmp_path):
    capture(TARGET, config(folder), tmp_path / "one")
    for part in ("1/2", "0/2"):
        capture(TARGET, replace(config(folder), part=part), tmp_path / "two")
    ours, theirs = (Store(tmp_path / name).entries for name in ("one", "two"))
    assert [(e.sample, e.hashes) for e in ours] == [(e.sample, e.hashes) for e in theirs]
