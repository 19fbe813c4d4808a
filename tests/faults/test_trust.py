"""Checkpoints are data: nothing in one is run or imported, or overrides the command line."""

import shutil
import struct
from pathlib import Path

import pytest
import torch
from runs import ENVIRONMENT, each, finish, last, start, start_command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CANARY = "hf_CANARYcanaryCANARYcanaryCANARYcanary"


class Payload:
    """Pickled as a call of ``os.system``."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.witness}",)


def forged(kind: str, good: dict, path: Path, witness: Path) -> str:
    """Write a malicious checkpoint; returns its address."""
    if kind == "a pickled call":
        torch.save({**good, "callbacks": Payload(witness)}, path)
    elif kind == "a pickled call, old format":
        torch.save({**good, "x": Payload(witness)}, path, _use_new_zipfile_serialization=False)
    elif kind == "a pickled class":
        torch.save({**good, "callbacks": Path("x")}, path)
    elif kind == "a kernel to fetch":
        config = {**good["drafter_config"], "attn_implementation": "somebody/kernel"}
        torch.save({**good, "drafter_config": config}, path)
    elif kind == "other tensors":
        weights = {**good["state_dict"], "drafter.fc.weight": torch.zeros(2, 2)}
        torch.save({**good, "state_dict": weights}, path)
    elif kind == "parts missing":
        torch.save({"state_dict": good["state_dict"]}, path)
    elif kind == "no dictionary":
        torch.save([1, 2], path)
    elif kind == "torn":
        torch.save(good, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "no checkpoint":
        path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    else:
        return f"{kind}://127.0.0.1:9/last.ckpt"
    return str(path)


KINDS = [
    "a pickled call", "a pickled call, old format", "a pickled class", "a kernel to fetch",
    "other tensors", "parts missing", "no dictionary", "torn", "no checkpoint",
    "http", "https", "HTTP", "ftp", "s3", "memory", "file", "simplecache::http",
]  # fmt: skip


@pytest.mark.parametrize("command", ["fit", "validate", "test", "export"])
def test_malicious_checkpoints_are_refused(store, reference, tmp_path, tally, command):
    good, witness = last(reference), tmp_path / "witness"

    def refused(kind: str) -> str:
        folder = tmp_path / "".join(filter(str.isalnum, kind))
        folder.mkdir()
        address = forged(kind, good, folder / "forged.ckpt", witness)
        if command == "export":
            run = start_command(folder, "export", "--ckpt_path", address, "--out", folder / "out")
        else:
            run = start(folder / "run", store, "--ckpt_path", address, command=command)
        code, said = run.wait(), run.said()
        if witness.exists():
            return f"{kind}: was executed"
        if code != 1 or "Traceback" in said or "peagle: " not in said:
            return f"{kind}: exit code {code}: {said[-500:]}"
        return ""

    tally(f"{command} with a malicious checkpoint", each(refused, KINDS))


def test_a_configuration_with_python_tags_is_not_run(store, tmp_path, tally):
    witness = tmp_path / "witness"
    path = tmp_path / "evil.yaml"
    tags = ("object/apply:os.system", "object/new:os.system")
    problems = []
    for tag in tags:
        path.write_text(f"seed_everything: !!python/{tag} ['touch {witness}']\n")
        run = start(tmp_path / "run", store, "--config", str(path))
        refused = run.wait() != 0 and not witness.exists()
        problems.append("" if refused else f"{tag}: {run.said()[-500:]}")
    tally("configuration with Python tags", problems)


@pytest.mark.short
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_hyper_parameters_in_a_checkpoint_are_ignored(store, reference, tmp_path, tally, command):
    witness = tmp_path / "witness"
    (tmp_path / "evil.py").write_text(
        "import pathlib, lightning\n"
        f"pathlib.Path({str(witness)!r}).touch()\n"
        "class Module(lightning.LightningModule): pass\n"
        "class Data(lightning.LightningDataModule): pass\n"
    )
    forged = torch.load(reference / "checkpoints/step-25.ckpt", weights_only=True)
    forged |= {
        "hyper_parameters": {"_class_path": "evil.Module", "num_layers": 3, "mask_token_id": 9},
        "datamodule_hyper_parameters": {"_class_path": "evil.Data", "seed": 7},
        "hparams_name": "evil.Module",
    }
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    torch.save(forged, run_dir / "checkpoints/last.ckpt")
    finish(
        run_dir,
        store,
        "--ckpt_path",
        "last",
        command=command,
        environment={"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{tmp_path}"},
    )
    problems = ["the module was imported" if witness.exists() else ""]
    if command == "fit":
        ours, theirs = last(run_dir), last(reference)
        equal = torch.equal(
            ours["state_dict"]["drafter.fc.weight"], theirs["state_dict"]["drafter.fc.weight"]
        )
        problems.append("" if equal else "the command line was overridden")
    tally(f"{command} with hyper-parameters in the checkpoint", problems)


def test_a_changed_learning_rate_is_the_one_that_counts(store, reference, tmp_path, tally):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    shutil.copy(reference / "checkpoints/step-25.ckpt", run_dir / "checkpoints/last.ckpt")
    options = ("--model.optimizer.init_args.lr=5e-4", "--model.optimizer.init_args.weight_decay=0")
    finish(run_dir, store, "--ckpt_path", "last", *options, every_n_steps=1)
    group = last(run_dir, "step-30.ckpt")["optimizer_states"][0]["param_groups"][0]
    before = last(reference, "step-30.ckpt")["optimizer_states"][0]["param_groups"][0]
    assert before["lr"] > 0
    halved = group["lr"] == pytest.approx(before["lr"] / 2, rel=1e-12)
    tally("changed learning rate on resume", ["" if halved and group["weight_decay"] == 0 else
                                              f"{group} after {before}"])  # fmt: skip


def test_another_optimizer_is_refused_with_both_names(store, reference, tmp_path, tally):
    path = str(reference / "checkpoints/step-25.ckpt")
    run = start(tmp_path / "run", store, "--ckpt_path", path,
                "--model.optimizer=torch.optim.SGD")  # fmt: skip
    code, said = run.wait(), run.said()
    right = code == 1 and "optimizer: checkpoint 'AdamW', this run 'SGD'" in said
    tally("resume with another optimizer", ["" if right else said[-500:]])


@pytest.mark.short
@pytest.mark.parametrize(
    ("option", "difference"),
    [
        ("--model.num_layers=2", "num_hidden_layers: checkpoint 1, this run 2"),
        ("--model.cod.num_depths=5", "num_depths: checkpoint 4, this run 5"),
        ("--model.hidden_size=64", "hidden_size: checkpoint 32, this run 64"),
    ],
)
def test_another_architecture_is_an_error_with_the_difference(
    store, reference, tmp_path, tally, option, difference
):
    run = start(tmp_path / "run", store, "--ckpt_path",
                str(reference / "checkpoints/last.ckpt"), option)  # fmt: skip
    code, said = run.wait(), run.said()
    right = code == 1 and difference in said and "Traceback" not in said
    tally(f"checkpoint of another architecture ({option[8:]})", ["" if right else said[-500:]])


def test_validate_leaves_the_configuration_of_fit_and_no_file_holds_the_token(
    store, tmp_path, tally
):
    run_dir = tmp_path / "run"
    environment = {"HF_TOKEN": CANARY, "HUGGING_FACE_HUB_TOKEN": CANARY}
    said = finish(run_dir, store, environment=environment).said()
    config = run_dir / "config.yaml"
    before = config.read_bytes()
    for option in ("--data.max_rows=32", "--seed_everything=3"):
        said += finish(
            run_dir,
            store,
            "--ckpt_path",
            "last",
            option,
            command="validate",
            environment=environment,
        ).said()
    tally("validate leaves fit's config.yaml", ["" if config.read_bytes() == before else "changed"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".ckpt" for path in files)
    assert CANARY not in said
    found = [str(path) if CANARY.encode() in path.read_bytes() else "" for path in files]
    tally("token in a file of the run", found)


def test_a_run_goes_on_in_its_folder_and_keeps_both_configurations(store, tmp_path, tally):
    run_dir = tmp_path / "run"
    finish(run_dir, store, "--trainer.max_epochs=1")
    first = (run_dir / "config.yaml").read_bytes()
    finish(run_dir, store, "--ckpt_path", "last")
    kept = (run_dir / "config.yaml").read_bytes() == first
    second = (run_dir / "config.resume-2.yaml").read_text()
    problem = "" if kept and "max_epochs: 2" in second else "configuration lost"
    tally("fit goes on in the same folder", [problem])


def test_a_new_run_in_an_old_folder_leaves_only_its_own_configuration(store, tmp_path, tally):
    run_dir = tmp_path / "run"
    finish(run_dir, store, "--trainer.max_epochs=1")
    finish(run_dir, store, "--ckpt_path", "last")
    before = {path.name for path in run_dir.glob("config*.yaml")}
    assert before == {"config.yaml", "config.resume-2.yaml"}
    finish(run_dir, store, "--seed_everything=3", "--trainer.max_epochs=1")
    left = {path.name: path.read_text() for path in run_dir.glob("config*.yaml")}
    right = list(left) == ["config.yaml"] and "seed_everything: 3" in left["config.yaml"]
    tally("a new fit in an old folder", ["" if right else f"left: {sorted(left)}"])
