"""Which class a drafter's configuration is of."""

from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter
from peagle.model.eagle3 import Eagle3Drafter
from peagle.model.p_eagle import PEagleDrafter


def drafter_class(config: PEagleConfig) -> type[Drafter]:
    """P-EAGLE's where drafting is parallel, else EAGLE-3's."""
    return PEagleDrafter if config.parallel_drafting else Eagle3Drafter
