"""The decoders that ``test`` compares: the drafter that was trained, and a baseline."""

import copy

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.decode.decoder import Decoder
from peagle.decode.evaluation import EvaluationConfig
from peagle.kernels.choose import Kernels
from peagle.kernels.device import pick_device
from peagle.model.drafter import Drafter
from peagle.model.restore import refuse_other_target
from peagle.model.saved_drafter import load_drafter
from peagle.serve.contract import as_served
from peagle.target.end_tokens import end_tokens
from peagle.target.target import TargetSource


def make_decoders(
    drafter: Drafter, source: TargetSource, config: EvaluationConfig, kernels: Kernels
) -> tuple[dict[str, Decoder], Tokenizer]:
    """Load the target, and the drafters as they are served: bf16 weights; by kind of drafter.

    Raises:
        ValueError: if a drafter is of another target, or one of the two cannot be opened.
    """
    drafters = {drafter.config.method: copy.deepcopy(drafter)}
    if config.baseline is not None:
        baseline = load_drafter(config.baseline)
        baseline.kernels = kernels
        method = baseline.config.method
        drafters[f"{method} (baseline)" if method in drafters else method] = baseline
    for found in drafters.values():
        refuse_other_target(found.config, source.config())
    dtype = getattr(torch, config.dtype)
    target = source.model(dtype=dtype, device=pick_device(config.device))
    tokenizer = source.tokenizer()
    ends = end_tokens(target, tokenizer)
    return {
        method: Decoder(target, as_served(found, dtype).to(target.device).eval(), eos_ids=ends)
        for method, found in drafters.items()
    }, tokenizer
