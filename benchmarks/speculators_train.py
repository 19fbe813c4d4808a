"""Trains speculators' P-EAGLE on samples of a store; runs in its environment, which has no peagle.

Model, alignment of the batch, loss, optimizers and schedule are the library's own; what its
trainer does around them (autocast, clipping at 1.0, warm-up over 1 % of the steps) is done here.
Which samples make a step is told by ``quality_speculators.py``, which also reads the result.
"""

import argparse
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from speculators.losses import resolve_loss_config
from speculators.models.eagle3.data import shift_batch
from speculators.models.peagle import PEagleDraftModel
from speculators.train.config.schema import OptimizerArgs
from speculators.train.optimizers import build_optimizers
from transformers import LlamaConfig, get_cosine_schedule_with_warmup

CLIP = 1.0


def model_of(job: dict[str, Any], device: torch.device) -> PEagleDraftModel:
    on_gpu = device.type == "cuda"
    model = PEagleDraftModel.from_training_args(
        LlamaConfig(
            **job["block"], num_hidden_layers=job["num_layers"], vocab_size=job["vocab_size"]
        ),
        verifier_name_or_path=job["target"],
        draft_vocab_size=job["vocab_size"],
        norm_before_residual=False,  # as its documentation has it for P-EAGLE
        mask_token_id=job["mask_token_id"],
        target_layer_ids=job["layer_ids"],
        num_depths=job["num_depths"],
        draft_attn_impl="simple_flex_attention" if on_gpu else "sdpa",
    )
    return model.float().to(device)


def batch_of(store: Path, samples: list[list], device: torch.device) -> dict[str, torch.Tensor]:
    """One packed sequence, without the padding that its loader would add."""
    parts = [shift_batch(sample_of(store, *place)) for place in samples]
    names = ("input_ids", "hidden_states", "verifier_last_hidden_states", "loss_mask")
    batch = {name: torch.cat([part[name] for part in parts])[None].to(device) for name in names}
    lengths = torch.tensor([len(part["input_ids"]) for part in parts])
    documents = torch.repeat_interleave(torch.arange(len(parts)), lengths)
    return {**batch, "document_ids": documents[None].to(device)}


def sample_of(store: Path, shard: str, slot: int) -> dict[str, torch.Tensor]:
    with safe_open(store / shard, "pt") as file:
        ids, mask, aux, final = (
            file.get_tensor(f"{slot}.{name}") for name in ("input_ids", "loss_mask", "aux", "final")
        )
    return {
        "input_ids": ids,
        "hidden_states": aux,
        "verifier_last_hidden_states": final,
        "loss_mask": mask,
        "lengths": torch.tensor([len(ids)]),
        "position_ids": torch.arange(len(ids)),
    }


def train(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Returns what is worth knowing; the weights go to ``job["out"]``."""
    torch.manual_seed(job["seed"])
    model, store, begin = model_of(job, device), Path(job["store"]), time.perf_counter()
    settings = OptimizerArgs(lr=job["lr"], muon_lr=job["lr"])
    optimizers = build_optimizers(model, Namespace(**settings.model_dump()))
    steps = len(job["steps"])
    schedules = [get_cosine_schedule_with_warmup(each, steps // 100, steps) for each in optimizers]
    call = {
        "loss_config": resolve_loss_config("kl_div", "fused" if device.type == "cuda" else "eager"),
        "num_depths": job["num_depths"],
        "down_sample_ratio": job["keep_ratio"],
        "down_sample_ratio_min": job["min_keep_ratio"],
    }
    for number, samples in enumerate(job["steps"]):
        with torch.autocast(device.type, torch.bfloat16):
            _, loss, _ = model(**batch_of(store, samples, device), **call)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for each in (*optimizers, *schedules):
            each.step()
        if number % 20 == 0:
            print(f"step {number} of {steps}, loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - begin
    save(model, Path(job["out"]))
    return {"seconds": seconds, "validation_loss": validate(model, job, device, call)}


@torch.no_grad()
def validate(model: PEagleDraftModel, job: dict[str, Any], device: torch.device, call: dict):
    """The library's own loss, with the same rows for every learning rate."""
    model.eval()
    torch.manual_seed(0)
    losses = []
    for samples in job["validation"]:
        with torch.autocast(device.type, torch.bfloat16):
            batch = batch_of(Path(job["store"]), samples, device)
            losses.append(model(**batch, **call)[1].item())
    return sum(losses) / len(losses)


def save(model: PEagleDraftModel, path: Path) -> None:
    """What it would serve: all but its copies of the verifier's norm and head."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("verifier_")
    }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="JSON written by quality_speculators.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(json.dumps(train(json.loads(args.job.read_text()), torch.device(args.device))))


if __name__ == "__main__":
    main()
