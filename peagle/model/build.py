"""The drafter that a configuration describes."""

from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter
from peagle.model.eagle3 import Eagle3Drafter
from peagle.model.p_eagle import PEagleDrafter


def build_drafter(config: PEagleConfig) -> Drafter:
    """P-EAGLE's where drafting is parallel, else EAGLE-3's; random weights."""
    return PEagleDrafter(config) if config.parallel_drafting else Eagle3Drafter(config)
