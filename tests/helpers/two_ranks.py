"""A step of several batches on two ranks, by gloo and DistributedDataParallel, in float64."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from peagle.cod.sampling import Rows
from peagle.train.objective import Outcome
from peagle.train.step_mean import StepMean, rescale

ROWS = ((7, 2), (46, 0), (3, 11))  # of each batch, on each rank


def inputs_of(batch, rank):
    draw = torch.Generator().manual_seed(10 * batch + rank)
    return torch.randn(ROWS[batch][rank], 5, generator=draw, dtype=torch.float64)


def outcome_of(model, x):
    zeros = torch.zeros(len(x), dtype=torch.long)
    values = model(x).flatten()
    return Outcome(values.square().sum(), float(len(x)), Rows(zeros, zeros), values > 0)


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 1, dtype=torch.float64)


def one_step(rank, file, results):
    """Gradients, loss and accuracy of a step as Lightning takes it, as this rank sees them."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model, mean = DistributedDataParallel(linear()), StepMean()
    for batch in range(len(ROWS)):
        model.require_backward_grad_sync = batch == len(ROWS) - 1
        (mean.add(outcome_of(model, inputs_of(batch, rank))) / len(ROWS)).backward()
    step = mean.finish()
    rescale(model.parameters(), len(ROWS) * step.factor)
    found = [*(p.grad for p in model.parameters()), step.loss, step.accuracy]
    results.put((rank, torch.cat([x.flatten() for x in found]).tolist()))
    dist.destroy_process_group()
