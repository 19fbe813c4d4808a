"""Every family of targets: captured, rebuilt, learned from, decoded without loss, exported.

One row per family, one column per promise; all of it through the code that a run uses.
"""

from typing import NamedTuple

import pytest
import torch
from family_targets import FAMILIES, SHAPE, WINDOW, make_model, write_target
from transformers import GraniteConfig, PreTrainedModel

from peagle.capture.capture import capture
from peagle.capture.config import CaptureConfig
from peagle.capture.prompts import PromptSource
from peagle.cod.sampling import Cod, sample_rows
from peagle.cod.segments import Segment
from peagle.decode.decoder import Decoder
from peagle.decode.sliding_window import LayerMasks
from peagle.model.initial_weights import initialise
from peagle.model.p_eagle import PEagleDrafter
from peagle.serve.contract import check_folder
from peagle.serve.export import export_drafter
from peagle.store.reader import Store
from peagle.target.head import TargetHead, check_head, target_head_of
from peagle.target.hidden_states import hidden_states
from peagle.target.layers import TargetLayers
from peagle.target.target import TargetSource
from peagle.train.module import PEagleModule
from peagle.train.objective import objective
from peagle.train.packing import Batch, pack

CONFIG = CaptureConfig(
    prompts=[PromptSource("stdlib", limit=2)],
    layer_ids=[1, 2, 3],
    max_new_tokens=5,
    max_tokens=256,
    greedy_share=1.0,
    batch_tokens=1,  # one conversation at a time: its states do not depend on the others' rounding
    dtype="bfloat16",
    val_share=0.5,
)


class Captured(NamedTuple):
    """A target of one family and the store made from it."""

    family: str
    model: PreTrainedModel  # in bf16
    source: TargetSource
    store: Store
    head: TargetHead

    def drafter(self) -> PEagleDrafter:
        """As a run starts it."""
        module = PEagleModule(mask_token_id=3, num_layers=2)
        drafter = PEagleDrafter(module.drafter_config(self.store.manifest))
        kept = torch.arange(self.store.manifest.vocab_size)
        layers = TargetLayers.load(self.store.folder / "target_layers.safetensors")
        initialise(drafter, self.head, kept, layers)
        return drafter


@pytest.fixture(scope="module", params=FAMILIES)
def captured(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = write_target(request.param, folder)
    model = source.model(dtype=torch.bfloat16, device="cpu")
    capture(source, CONFIG, folder / "store")
    store = Store(folder / "store")
    head = TargetHead.load(
        folder / "store" / "target.safetensors",
        eps=store.manifest.rms_norm_eps,
        softcap=store.manifest.softcap,
    )
    return Captured(request.param, model, source, store, head)


def difference(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def test_what_is_stored_enters_the_layers_and_final_comes_before_the_norm(captured):
    assert len(captured.store) == 2
    sample = captured.store.read(0)
    out = captured.model(sample.input_ids[None], output_hidden_states=True)
    entering = [out.hidden_states[k][0] for k in (1, 2, 3)]
    assert torch.equal(sample.aux, torch.cat(entering, -1))
    last = out.hidden_states[4][0]  # transformers' last entry is after the norm
    assert torch.equal(captured.model.get_decoder().norm(sample.final), last)
    assert difference(sample.final, last) > 0.1


@torch.no_grad()
def test_the_targets_logits_are_rebuilt_from_the_store(captured):
    sample = captured.store.read(0)
    theirs = captured.model(sample.input_ids[None]).logits[0].float()
    assert difference(captured.head(sample.final), theirs) < 1e-3
    exact = captured.source.model(dtype=torch.float32, device="cpu")
    head = target_head_of(exact, captured.source.config()).float()
    with hidden_states(exact, ()) as seen:
        theirs = exact(sample.input_ids[None]).logits[0]
    assert difference(head(seen.entering[4][0]), theirs) < 1e-5


@torch.no_grad()
def test_a_drafter_starts_from_the_embedding_head_and_norm_that_the_target_applies(captured):
    drafter, model = captured.drafter(), captured.model
    ids, states = torch.arange(8, 40), torch.randn(5, 64)
    assert difference(drafter.embed_tokens(ids), model.get_input_embeddings()(ids)) < 1e-6
    logits = model.get_output_embeddings()(states.bfloat16())
    assert difference(drafter.lm_head(states), logits) < 1e-2
    assert difference(drafter.norm(states, drafter.ops), model.get_decoder().norm(states)) < 1e-4


def test_a_few_steps_on_the_store_lower_the_loss(captured):
    drafter, samples = captured.drafter(), [captured.store.read(i) for i in range(2)]
    slots = pack(samples)
    batch = Batch(**slots, segments=(Segment(0, len(slots["tokens"])),), seed=0)
    rows = sample_rows(
        batch.supervised, batch.document, cod=Cod(3, 0.8), generator=torch.Generator()
    )
    assert len(rows.anchor) > 8
    optimizer, losses = torch.optim.AdamW(drafter.parameters(), lr=3e-3), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = objective(drafter, captured.head, batch, rows, mix={"kl": 1.0}).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_greedy_output_with_a_drafter_is_the_targets_own(captured):
    target = captured.source.model(dtype=torch.float32, device="cpu")
    prompts = [list(range(20, 20 + n)) for n in (3 * WINDOW, 4, WINDOW + 2)]
    decoder = Decoder(target, captured.drafter().eval(), eos_ids=set())
    decoded = decoder.decode(prompts, k=3, temperature=0.0, max_new_tokens=2 * WINDOW)
    for prompt, answer in zip(prompts, decoded.tokens, strict=True):
        # Without any cache: by causality, every choice of a greedy decoding in one pass.
        logits = target(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert len(answer) == 2 * WINDOW


def test_an_exported_drafter_passes_the_engines_contract(captured, tmp_path):
    export_drafter(captured.drafter(), tmp_path / "drafter")
    config = check_folder(tmp_path / "drafter")
    text = captured.source.config()
    assert (config.target_hidden_size, config.vocab_size) == (text.hidden_size, text.vocab_size)
    assert config.eagle_aux_hidden_state_layer_ids == [1, 2, 3]


def test_without_its_windows_a_target_would_say_something_else():
    """Else the table above could not tell whether decoding heeds them."""
    decoder = Decoder(make_model(FAMILIES["gpt-oss"]()), None, eos_ids=set())
    prompt = [list(range(20, 20 + 3 * WINDOW))]
    right = decoder.decode(prompt, k=0, temperature=0.0, max_new_tokens=12).tokens
    decoder.masks = LayerMasks([None] * 4)
    wrong = decoder.decode(prompt, k=0, temperature=0.0, max_new_tokens=12).tokens
    assert right != wrong


def test_a_target_that_attends_in_a_way_of_its_own_is_not_decoded():
    target = make_model(FAMILIES["llama"]())
    target.config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(ValueError, match=r"llama exactly.*layers of chunked_attention"):
        Decoder(target, None, eos_ids=set())


def test_a_family_that_does_more_to_its_logits_is_refused():
    target = make_model(GraniteConfig(**SHAPE, logits_scaling=4.0))
    head = target_head_of(target, target.config)
    with pytest.raises(ValueError, match=r"type granite cannot be rebuilt .* \(relative error 3\)"):
        check_head(target, head, torch.arange(8, 40))


def test_a_target_whose_logits_are_nan_is_refused_before_its_first_answer(tmp_path):
    source = write_target("llama", tmp_path)
    model = source.model(dtype=torch.float32, device="cpu")
    model.get_input_embeddings().weight.data[8:] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the target's logits are NaN in torch\.bfloat16"):
        capture(source, CONFIG, tmp_path / "store")
    assert not (tmp_path / "store" / "answers.jsonl").exists()
