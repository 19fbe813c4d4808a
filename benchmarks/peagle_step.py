"""One measurement of this package's training step, in a process of its own; prints JSON."""

import json

import torch
from measure import STORED, autocast, measure, print_result, step_parser
from shapes import Shape

from peagle.cod.sampling import Cod, expected_rows, sample_rows
from peagle.cod.segments import partition
from peagle.model.config import PEagleConfig
from peagle.model.p_eagle import PEagleDrafter
from peagle.target.head import TargetHead
from peagle.train.objective import objective
from peagle.train.packing import Batch


def drafter_of(shape: Shape) -> PEagleDrafter:
    return PEagleDrafter(
        PEagleConfig(
            **shape.block(),
            draft_vocab_size=shape.draft_vocab,
            eagle_aux_hidden_state_layer_ids=list(range(1, shape.captured + 1)),
        )
    )


def target_head_of(shape: Shape) -> TargetHead:
    """In the precision that a capture stores it in, the target's."""
    dtype = STORED[shape.dtype]
    return TargetHead(
        norm=torch.ones(shape.hidden, dtype=dtype),
        head=(torch.randn(shape.draft_vocab, shape.hidden) / shape.hidden**0.5).to(dtype),
        embedding=torch.zeros(1, shape.hidden),
        eps=1e-6,
        softcap=None,
    )


def batch_of(shape: Shape, *, cod: Cod, max_rows: int) -> Batch:
    """One document of random hidden states."""
    dtype = STORED[shape.dtype]
    supervised, document = torch.ones(shape.n, dtype=torch.bool), torch.zeros(shape.n).long()
    expected = expected_rows(supervised, document, cod=cod)
    return Batch(
        tokens=torch.randint(1, shape.vocab, (shape.n,)),
        labels=torch.randint(1, shape.vocab, (shape.n,)),
        aux=torch.randn(shape.n, shape.captured * shape.hidden).to(dtype),
        final=torch.randn(shape.n, shape.hidden).to(dtype),
        position=torch.arange(shape.n),
        document=document,
        supervised=supervised,
        segments=partition(expected, max_rows=max_rows),
        seed=0,
    )


def run(shape: Shape, *, max_rows: int, steps: int, device: torch.device) -> dict:
    torch.manual_seed(0)
    cod = Cod(shape.depths, shape.keep_ratio, shape.min_keep_ratio)
    with device:  # random weights are made where they are used
        drafter, head = drafter_of(shape), target_head_of(shape)
    batch = batch_of(shape, cod=cod, max_rows=max_rows)
    kept = {"document": batch.document, "supervised": batch.supervised}
    moved = {k: v.to(device) for k, v in batch._asdict().items() if isinstance(v, torch.Tensor)}
    batch = batch._replace(**{**moved, **kept})

    def step() -> None:
        drafter.zero_grad(set_to_none=True)
        rows = sample_rows(
            batch.supervised,
            batch.document,
            cod=cod,
            generator=torch.Generator().manual_seed(batch.seed),
        )
        with autocast(shape, device):
            outcome = objective(drafter, head, batch, rows, mix={"kl": 1.0})
        (outcome.loss / len(rows.anchor)).backward()

    measured = measure(step, steps=steps, device=device)
    norm = torch.nn.utils.get_total_norm([p.grad for p in drafter.parameters()]).item()
    return {**measured._asdict(), "segments": len(batch.segments), "gradient_norm": norm}


def main() -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--max_rows", type=int, required=True)
    args = parser.parse_args()
    shape = Shape(**json.loads(args.shape))
    result = run(shape, max_rows=args.max_rows, steps=args.steps, device=torch.device(args.device))
    print_result(shape, result)


if __name__ == "__main__":
    main()
