"""Mixes of losses that every form of the loss is tested with."""

from peagle.train.loss import LOSSES

MIXES = [{name: 1.0} for name in LOSSES] + [{"kl": 0.3, "tv": 2.0, "ce": 0.5, "lk_hybrid": 0.7}]
