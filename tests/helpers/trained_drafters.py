"""Drafters for the embedded target that are right about some tokens and wrong about others.

Both kinds with equally many layers, started from the target's, and trained equally long on what the
target itself says after one prompt.
"""

from functools import cache

import torch

from peagle.capture.identity import llama_block
from peagle.cod.sampling import Cod, sample_rows
from peagle.cod.segments import Segment
from peagle.decode.decoder import Decoder
from peagle.model.build import build_drafter
from peagle.model.config import PEagleConfig, default_layer_ids
from peagle.model.drafter import Drafter
from peagle.model.initial_weights import initialise
from peagle.serve.contract import as_served
from peagle.store.sample import Sample
from peagle.target.head import target_head_of
from peagle.target.hidden_states import decoder_layers, hidden_states
from peagle.target.layers import default_start_layers, target_layers_of
from peagle.target.target import TargetSource
from peagle.train.objective import objective
from peagle.train.packing import Batch, pack

PROMPT = "for key, value in "
LAYERS, STEPS, DOCUMENTS, LENGTH = 2, 20, 32, 4
COD = Cod(num_depths=2, keep_ratio=1.0)


def answers(target, layer_ids, prompt: list[int]) -> Batch:
    """What the target says after the prompt, sampled; every token of it is supervised."""
    decoded = Decoder(target, None, eos_ids=set()).decode(
        [prompt] * DOCUMENTS,
        k=0,
        temperature=1.0,
        max_new_tokens=LENGTH,
        generator=torch.Generator().manual_seed(7),
    )
    ids = torch.tensor([[*prompt, *tokens] for tokens in decoded.tokens])
    with torch.no_grad(), hidden_states(target, layer_ids) as seen:
        target(input_ids=ids, use_cache=False)
    aux, final = seen.aux(layer_ids), seen.entering[len(decoder_layers(target))]
    mask = torch.arange(ids.shape[1]) >= len(prompt) - 1
    packed = pack([Sample(i, mask, a, f) for i, a, f in zip(ids, aux, final, strict=True)])
    return Batch(**packed, segments=(Segment(0, len(packed["tokens"])),), seed=0)


@cache
def embedded_target():
    return TargetSource("tiny").model(dtype=torch.float32, device="cpu")


def token_ids(text: str) -> tuple[int, ...]:
    """A text of code as the embedded target begins it."""
    tokenizer = TargetSource("tiny").tokenizer()
    return (1, *tokenizer(text, add_special_tokens=False)["input_ids"])


@cache
def trained_drafter(*, parallel_drafting: bool) -> Drafter:
    """As ``fit`` makes one, in seconds; whoever asks again gets the same one."""
    target = embedded_target()
    text = TargetSource("tiny").config()
    layer_ids = default_layer_ids(text.num_hidden_layers)
    config = PEagleConfig(
        **llama_block(text),
        num_hidden_layers=LAYERS,
        vocab_size=text.vocab_size,
        mask_token_id=3,
        num_depths=COD.num_depths,
        eagle_aux_hidden_state_layer_ids=layer_ids,
        parallel_drafting=parallel_drafting,
    )
    head = target_head_of(target, text)
    start = target_layers_of(target, text, default_start_layers(text.num_hidden_layers))
    batch = answers(target, layer_ids, list(token_ids(PROMPT)))
    rows = sample_rows(batch.supervised, batch.document, cod=COD, generator=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drafter = build_drafter(config)
        initialise(drafter, head, torch.arange(text.vocab_size), start)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=2e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (objective(drafter, head, batch, rows, mix={"kl": 1.0}).loss / len(rows.anchor)).backward()
        optimizer.step()
    return as_served(drafter, torch.float32).eval()
