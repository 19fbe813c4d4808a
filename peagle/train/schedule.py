"""Learning-rate schedules by optimizer step. Each is a class that is given the number of steps."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class LinearSchedule(LambdaLR):
    """Linear warm-up, then linear decay to zero (paper section 4.1).

    Args:
        total_steps: of the whole run.
        warmup_ratio: share of the steps in which the rate rises.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_ratio: float = 0.0025):
        warmup = max(1, round(total_steps * warmup_ratio))

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return max(0.0, (total_steps - step) / max(1, total_steps - warmup))

        super().__init__(optimizer, scale)
