"""Speculative decoding changes the speed, never the output."""

import pytest
import torch
from random_parts import LAYER_IDS, VOCABULARY, WIDTH, make_drafter, make_target

from peagle.decode.decoder import Decoder, verify
from peagle.target.hidden_states import hidden_states

PROMPTS = [[7, 9, 11, 20], [30, 8], [6, 6, 40, 12, 17, 33, 21]]


@pytest.fixture(params=[True, False], ids=["p-eagle", "eagle3"])
def decoder(request):
    return Decoder(make_target(), make_drafter(parallel_drafting=request.param), eos_ids=set())


def target_alone(target, prompt, count):
    """Greedy decoding without any cache: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(target(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_greedy_output_is_the_targets_own_token_for_token(decoder, k):
    decoded = decoder.decode(PROMPTS, k=k, temperature=0.0, max_new_tokens=24)
    assert decoded.tokens == [target_alone(decoder.target, p, 24) for p in PROMPTS]
    assert max(map(len, decoded.tokens)) == 24
    rounds = max(map(len, decoded.accepted))
    assert len(decoded.draft_seconds) == (rounds if k else 0)
    assert sum(decoded.draft_seconds) < decoded.seconds


def test_a_drafter_that_knows_the_target_is_always_accepted(decoder, monkeypatch):
    """Drafts are replaced by what the target is going to say: every one must be kept."""
    k, length = 4, 21
    truth = [target_alone(decoder.target, p, 40) for p in PROMPTS]
    assert min(map(len, truth)) == 40
    done = [1] * len(PROMPTS)

    def oracle(drafter, cache, tokens, aux, start, count, *, num_tokens):
        drafts = [text[n : n + num_tokens] for text, n in zip(truth, done, strict=True)]
        for row in range(len(done)):
            done[row] += num_tokens + 1
        return torch.tensor(drafts)

    monkeypatch.setattr("peagle.decode.decoder.draft", oracle)
    decoded = decoder.decode(PROMPTS, k=k, temperature=0.0, max_new_tokens=length)
    assert decoded.tokens == [text[:length] for text in truth]
    assert decoded.accepted == [[4, 4, 4, 4]] * 3  # 1 + 4 rounds of 5 tokens


def test_an_end_token_stops_its_row_only(decoder):
    free = decoder.decode(PROMPTS, k=3, temperature=0.0, max_new_tokens=24)
    end = free.tokens[0][5]
    stopped = Decoder(decoder.target, decoder.drafter, eos_ids={end})
    decoded = stopped.decode(PROMPTS, k=3, temperature=0.0, max_new_tokens=24)
    for ours, whole in zip(decoded.tokens, free.tokens, strict=True):
        cut = whole.index(end) + 1 if end in whole else len(whole)
        assert ours == whole[:cut]


@torch.no_grad()
def test_a_row_that_is_done_early_may_go_on_accepting_while_others_finish():
    """The target says 0 after 0 and else counts up; the drafter always guesses 0.

    So the first row is done in 3 of the 24 rounds that the second one needs.
    """
    target, drafter = make_target(), make_drafter()
    for layer in target.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    following = torch.arange(VOCABULARY).roll(-1)
    following[0], following[-1] = 0, 1
    embedding = torch.nn.functional.normalize(torch.randn(VOCABULARY, WIDTH).double(), dim=-1)
    target.model.embed_tokens.weight.copy_(embedding)
    target.lm_head.weight[following] = embedding
    drafter.fc.weight.zero_()
    for layer in drafter.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    decoder = Decoder(target, drafter, eos_ids=set())
    decoded = decoder.decode([[0, 0], [1, 2]], k=7, temperature=0.0, max_new_tokens=24)
    assert decoded.tokens == [[0] * 24, list(range(3, 27))]
    assert decoded.accepted == [[7, 7, 7], [0] * 23]


def test_sampling_keeps_the_targets_distribution():
    """The first verified token, over many draws, against its exact distribution.

    With 40,000 draws over 6 tokens a shift of total variation 0.02 would fail this test.
    """
    draws, vocabulary = 40_000, 6
    logits = torch.randn(1, 2, vocabulary).expand(draws, -1, -1)
    likely = int(logits[0, 0].argmax())
    draft_token = torch.full((draws, 1), likely)
    generator = torch.Generator().manual_seed(0)
    verified = verify(logits, draft_token, 0.7, generator)
    first = torch.where(verified.accepted == 1, draft_token[:, 0], verified.next_token)
    seen = torch.bincount(first, minlength=vocabulary) / draws
    exact = torch.softmax(logits[0, 0] / 0.7, -1)
    assert 0.1 < exact[likely] < 0.9  # both branches are taken
    assert (seen - exact).abs().sum() / 2 < 0.01
    after = verified.next_token[verified.accepted == 1]
    seen = torch.bincount(after, minlength=vocabulary) / len(after)
    assert (seen - torch.softmax(logits[0, 1] / 0.7, -1)).abs().sum() / 2 < 0.02


def test_the_same_generator_samples_the_same_text(decoder):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return decoder.decode(
            PROMPTS, k=3, temperature=1.0, max_new_tokens=12, generator=generator
        ).tokens

    assert run(1) == run(1) != run(2)
    assert all(0 <= token < VOCABULARY for text in run(1) for token in text)


def test_layer_ids_count_as_in_vllm_and_transformers():
    """Id k is what enters layer k; the last is the output of all layers before the norm."""
    target = make_target(num_layers=4)
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad(), hidden_states(target, LAYER_IDS) as seen:
        out = target(ids, output_hidden_states=True)
    for k in LAYER_IDS:
        assert torch.equal(seen.entering[k], out.hidden_states[k])
    normed = target.model.norm(seen.entering[4])
    assert torch.allclose(normed, out.hidden_states[4])
    assert not torch.allclose(seen.entering[4], out.hidden_states[4])
