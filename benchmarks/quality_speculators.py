"""speculators' own P-EAGLE on the same store and steps, measured like every recipe.

    python benchmarks/quality_speculators.py --python .venv-speculators/bin/python --steps 700

speculators 0.9.0 trains in an environment of its own (``--python``; made as for
``against_speculators.py``) with what it documents for P-EAGLE: KL divergence, Muon beside AdamW
with its weight decays, cosine schedule, ratio 0.7 and floor 0.2, eight depths (its default),
trained embedding, the target's frozen head. It gets the default recipe's sequences in the same
order and as many layers (its tutorial's four: ``--layers 4``), and of several learning rates, all
trained to the end with the first seed, the one whose drafter has the lowest validation loss. Its
tensors are those of the serving contract, so the drafter is ours to decode, export and serve.
"""

import argparse
import hashlib
import json
import subprocess
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from intervals import PEERS, summary
from quality import BASE, add_measuring, without_repeats
from quality_results import (
    Measurement,
    Row,
    format_runs,
    headline,
    key_of,
    read_rows,
    runs_of,
    save_rows,
)
from quality_runs import ROOT, captured_store, evaluation, evaluation_of, pooled
from recipes import check_size, resolved, steps_per_epoch
from report import machine
from safetensors.torch import load_file
from tqdm import tqdm

from peagle.capture.prompts import PromptSource
from peagle.decode.acceptance import acceptance_rows
from peagle.decode.decoder import Decoder
from peagle.decode.evaluation import EvaluationConfig, decode_batch, prompt_batches
from peagle.kernels.device import pick_device
from peagle.model.config import PEagleConfig
from peagle.model.p_eagle import PEagleDrafter
from peagle.model.restore import refuse_other_tensors
from peagle.serve.contract import as_served
from peagle.serve.export import export_drafter
from peagle.store.reader import Store
from peagle.target.end_tokens import end_tokens
from peagle.target.target import TargetSource
from peagle.train.sampler import fill_packs, shuffle_packs

NAME, VERSION = PEERS[1], "0.9.0"
Samples = list[tuple[str, int]]  # shard and number within it


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="python of speculators' environment")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--layers", type=int, help="default: as many as the configuration")
    parser.add_argument("--depths", type=int, default=8)
    add_measuring(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "quality")
    parser.add_argument("--most_epochs", type=float, default=10, help="repetitions of the store")
    return without_repeats(parser.parse_args())


def main() -> None:
    args = arguments()
    try:
        compare(args)
    except ValueError as error:
        raise SystemExit(f"quality_speculators: {error}") from None


def compare(args: argparse.Namespace) -> None:
    """Choose the learning rate, train the seeds, test, and print where the recipes stand."""
    settings, store = resolved(BASE, args.config), captured_store(args, BASE)
    epoch = steps_per_epoch(store, settings)
    check_size(BASE, epoch, steps=args.steps, most_epochs=args.most_epochs)
    shape = shape_of(store, settings, args)
    folder = args.out / NAME / fingerprint(shape, args)
    measurement = Measurement(args.steps, None, store.manifest.identity(), evaluation_of(args))
    sweep = {}
    for lr in tqdm(args.lr, desc="learning rates"):
        result = trained(folder, shape, lr, args.seeds[0], store, args)
        sweep[lr] = result["validation_loss"]
    best = min(sweep, key=sweep.__getitem__)
    print(f"validation loss by learning rate {sweep}: {best:g}")
    known = {key_of(row) for row in read_rows(args.results)}
    for seed in tqdm(args.seeds, desc="seeds"):
        result = trained(folder, shape, best, seed, store, args)
        shared = {"recipe": NAME, "fingerprint": folder.name, "seed": seed,
                  **measurement._asdict()}  # fmt: skip
        rows = ({**shared, "k": k, "temperature": t} for k in args.k for t in args.temperatures)
        if not all(key_of(row) in known for row in rows):
            public = {key: value for key, value in shape.items() if key != "target"}  # a path
            facts = {"overrides": {"version": VERSION, "lr": best, **public}, "sweep": sweep,
                     "training_hours": result["seconds"] / 3600, "loss": None,
                     "steps_done": args.steps, "machine": machine()}  # fmt: skip
            drafter = drafter_of(Path(result["out"]), shape, store)
            export_drafter(drafter, Path(result["out"]).with_name("drafter"))
            rows = [{**shared, **facts, **row} for row in tested(drafter, settings, args)]
            save_rows(args.results, rows, measurement)
    report(args, measurement)


def shape_of(store: Store, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The drafter and what it is trained on."""
    if settings["trainer"]["accumulate_grad_batches"] != 1:
        raise ValueError("speculators does not accumulate: use a configuration that does not")
    return {
        "num_layers": args.layers or settings["model"]["num_layers"],
        "num_depths": args.depths,
        "keep_ratio": 0.7,
        "min_keep_ratio": 0.2,
        "mask_token_id": settings["model"]["mask_token_id"],
        "max_tokens": settings["data"]["max_tokens"],
        "layer_ids": list(store.manifest.layer_ids),
        "vocab_size": store.manifest.vocab_size,
        "target": TargetSource(settings["target"], settings["revision"]).path,
    }


def fingerprint(shape: dict[str, Any], args: argparse.Namespace) -> str:
    """Of what is trained; the target's path is no part of it."""
    kept = {key: value for key, value in shape.items() if key != "target"}
    text = json.dumps([VERSION, kept, args.lr], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trained(
    folder: Path,
    shape: dict[str, Any],
    lr: float,
    seed: int,
    store: Store,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One training in speculators' environment, unless it was finished before."""
    name = f"lr{lr:g}-steps{args.steps}-seed{seed}-store{store.manifest.identity()[:12]}"
    run_dir = (folder / name).resolve()
    done, out = run_dir / "result.json", run_dir / "trained.safetensors"
    if done.exists():
        return json.loads(done.read_text())
    run_dir.mkdir(parents=True, exist_ok=True)
    job = {
        **shape,
        "block": store.manifest.block,
        "store": str(args.store.resolve()),
        "steps": training_order(store, shape["max_tokens"], seed, args.steps),
        "validation": packed(store, "val", shape["max_tokens"], None),
        "lr": lr,
        "seed": seed,
        "out": str(out),
    }
    (run_dir / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("speculators_train.py")
    with (run_dir / "log.txt").open("w") as log:
        code = subprocess.run(
            [args.python, str(script), str(run_dir / "job.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    lines = (run_dir / "log.txt").read_text().splitlines()
    if code:
        raise SystemExit("speculators_train.py failed:\n" + "\n".join(lines[-15:]))
    result = {**json.loads(lines[-1]), "out": str(out)}
    done.write_text(json.dumps(result))
    return result


def packed(store: Store, split: str, max_tokens: int, seed: int | None) -> list[Samples]:
    """The sequences of ``HiddenStatesDataModule``, by the places of their samples."""
    samples = [i for i in store.split(split) if 1 <= store.entries[i].tokens - 2 <= max_tokens]
    lengths = [store.entries[i].tokens - 2 for i in samples]
    groups = fill_packs(samples, lengths, max_tokens=max_tokens, seed=seed)
    return [places(store, group) for group in groups]


def places(store: Store, group: tuple[int, ...]) -> Samples:
    return [(store.entries[i].shard, store.entries[i].slot) for i in group]


def training_order(store: Store, max_tokens: int, seed: int, steps: int) -> list[Samples]:
    """What the default recipe trains with this seed, step by step."""
    groups = packed(store, "train", max_tokens, seed)
    order: list[Samples] = []
    for epoch in count():
        numbers = shuffle_packs([(i,) for i in range(len(groups))], seed=seed, epoch=epoch)
        order += [groups[pack.samples[0]] for pack in numbers]
        if len(order) >= steps:
            return order[:steps]


def drafter_of(weights: Path, shape: dict[str, Any], store: Store) -> PEagleDrafter:
    """speculators' tensors in our drafter; raises ``ValueError`` unless they are the same ones."""
    drafter = PEagleDrafter(
        PEagleConfig(
            **store.manifest.block,
            num_hidden_layers=shape["num_layers"],
            vocab_size=shape["vocab_size"],
            mask_token_id=shape["mask_token_id"],
            num_depths=shape["num_depths"],
            eagle_aux_hidden_state_layer_ids=shape["layer_ids"],
        )
    )
    tensors = load_file(weights)
    refuse_other_tensors(tensors, drafter.state_dict())
    drafter.load_state_dict(tensors)
    return drafter.eval()


def tested(drafter: PEagleDrafter, settings: dict[str, Any], args: argparse.Namespace) -> list[Row]:
    """As ``test`` does it: the drafter as it is served, in bf16 weights, beside the target."""
    asked = {key.removeprefix("evaluation."): value for key, value in evaluation(args).items()}
    asked["prompts"] = [PromptSource(**source) for source in asked["prompts"]]
    config, source = (
        EvaluationConfig(**asked),
        TargetSource(settings["target"], settings["revision"]),
    )
    dtype = getattr(torch, config.dtype)
    target = source.model(dtype=dtype, device=pick_device(config.device))
    served = as_served(drafter, dtype).to(target.device)
    tokenizer = source.tokenizer()
    decoders = {NAME: Decoder(target, served, eos_ids=end_tokens(target, tokenizer))}
    runs = [
        run
        for batch in prompt_batches(config, source)
        for run in decode_batch(decoders, batch, config, tokenizer)
    ]
    return pooled(acceptance_rows(runs, engine="peagle reference loop", dtype=config.dtype))


def report(args: argparse.Namespace, measurement: Measurement) -> None:
    rows = read_rows(args.results)
    for k, t in product(args.k, args.temperatures):
        runs = runs_of(rows, measurement, k, t)
        chosen = {name: runs[name] for name in ("default", NAME) if name in runs}
        print(f"\nK = {k}, temperature {t:g}\n{format_runs(chosen, NAME)}")
    ratio = summary(headline(rows, measurement)[1])[f"ratio_to_{NAME}"]
    print(f"default to {NAME}: {'not measured' if ratio is None else f'{ratio:.3f}'}")
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
