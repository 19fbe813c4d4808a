"""Which class a drafter's configuration is of."""

from peagle.model.base import Drafter
from peagle.model.config import PEagleConfig
from peagle.model.drafter import PEagleDrafter
from peagle.model.eagle3 import Eagle3Drafter


def drafter_class(config: PEagleConfig) -> type[Drafter]:
    """P-EAGLE's where drafting is parallel, else EAGLE-3's."""
    return PEagleDrafter if config.parallel_drafting else Eagle3Drafter
