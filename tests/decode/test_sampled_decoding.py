"""Sampled speculative decoding has the target's own distribution, to the power of a stated test.

The embedded target continues a prompt by three tokens at temperature 1, thousands of times, with
drafters of both kinds that are right sometimes (``trained_drafters.py``). The continuations are
compared with the exact distribution by a chi-square test at significance 1e-4, rare ones pooled
with what begins alike. With DRAWS its power is

* above 0.99 against every sampler that is off by a total variation of 0.15 on these cells (0.06 for
  the slow form's 20,000 draws), since its chi-square distance is then at least 4 * 0.15 ** 2;
* above 0.99 against a sampler that forgets which draft it has just refused, and against one that
  keeps every draft that is the target's first choice. Both are tried, and rejected.
"""

from functools import cache

import pytest
import torch
from distribution import (
    Tokens,
    cells_of,
    chi_square,
    critical,
    distance,
    pooled,
    power,
    probabilities,
)
from trained_drafters import PROMPT, token_ids, trained_drafter
from trained_drafters import embedded_target as target

from peagle.decode.decoder import Decoder, Verified, sample, verify
from peagle.decode.drafting import draft, new_cache
from peagle.target.hidden_states import hidden_states

# Thousands of draws of what test_decoder.py runs under the checks of shapes.
pytestmark = pytest.mark.usefixtures("without_type_checks")
LENGTH, DRAWS, SIGNIFICANCE = 3, 1200, 1e-4


@cache
def prompt() -> Tokens:
    return token_ids(PROMPT)


@cache
def decoder(parallel: bool) -> Decoder:
    return Decoder(target(), trained_drafter(parallel_drafting=parallel), eos_ids=set())


def after(begins: list[Tokens]) -> torch.Tensor:
    """The target's distribution of the next token, without any cache."""
    ids = torch.tensor([[*prompt(), *begin] for begin in begins])
    with torch.no_grad():
        return torch.softmax(target()(ids, use_cache=False).logits[:, -1].double(), -1)


@cache
def cells(draws: int) -> dict[Tokens, float]:
    return cells_of(after, length=LENGTH, draws=draws)


def drawn(parallel: bool, k: int, draws: int):
    """Continuations, and how many rounds accepted 0, 1, ... drafts."""
    tokens, accepted = [], []
    for start in range(0, draws, 1000):
        decoded = decoder(parallel).decode(
            [list(prompt())] * min(1000, draws - start),
            k=k,
            temperature=1.0,
            max_new_tokens=LENGTH,
            generator=torch.Generator().manual_seed(start),
        )
        tokens += decoded.tokens
        accepted += [n for rounds in decoded.accepted for n in rounds]
    return tokens, torch.bincount(torch.tensor(accepted), minlength=k + 1).tolist()


def test_the_test_itself_is_calibrated():
    """The chi-square and its power against published quantiles and against simulation."""
    assert critical(1, 0.05) == pytest.approx(3.8415, abs=1e-4)
    assert critical(100, 0.01) == pytest.approx(135.807, abs=1e-3)
    p, q = torch.full((8,), 1 / 8).double(), torch.tensor([9, 9, 9, 9, 7, 7, 7, 7]).double() / 64
    away = distance(dict(enumerate(q.tolist())), dict(enumerate(p.tolist())))
    assert away == pytest.approx(1 / 64)
    counts = torch.distributions.Multinomial(1000, q).sample((4000,))
    rejected = (((counts - 125) ** 2 / 125).sum(-1) > critical(7, 0.05)).double().mean().item()
    assert 0.3 < rejected < 0.95
    computed = power(away, draws=1000, freedom=7, significance=0.05)
    assert computed == pytest.approx(rejected, abs=0.03)


def check_distribution(parallel: bool, k: int, draws: int, *, off: float) -> None:
    tokens, rounds = drawn(parallel, k, draws)
    freedom = len(cells(draws)) - 1
    assert freedom > 30, "a distribution of few continuations would be no test"
    assert min(rounds) > draws / 100, f"some ways to end a round hardly occur: {rounds}"
    assert power(4 * off**2, draws=draws, freedom=freedom, significance=SIGNIFICANCE) > 0.99
    assert chi_square(tokens, cells(draws)) < critical(freedom, SIGNIFICANCE)


@pytest.mark.parametrize(
    ("parallel", "k"),
    [(True, 1), (True, 2), (False, 2)],
    ids=["p-eagle-1", "p-eagle-2", "eagle3-2"],
)
def test_speculative_samples_have_the_targets_distribution(parallel, k):
    check_distribution(parallel, k, DRAWS, off=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [True, False], ids=["p-eagle", "eagle3"])
@pytest.mark.parametrize("k", [1, 2])
def test_many_speculative_samples_have_the_targets_distribution(parallel, k):
    check_distribution(parallel, k, 20_000, off=0.06)


def forgetful(logits, drafts, temperature, generator):
    """Draws from the whole distribution after a refusal, the refused draft included."""
    accepted = verify(logits, drafts, temperature, generator).accepted
    p = torch.softmax(logits[torch.arange(len(drafts)), accepted] / temperature, -1)
    return Verified(accepted, sample(p, generator))


def eager(logits, drafts, temperature, generator):
    """Keeps a draft that is the target's first choice, as if decoding were greedy."""
    accepted = verify(logits, drafts, 0.0, None).accepted
    p = torch.softmax(logits[torch.arange(len(drafts)), accepted] / temperature, -1)
    return Verified(accepted, sample(p, generator))


CHANCE = {  # of keeping drafts d, [B], where the target says p, [B, V]
    forgetful: lambda p, d: p.gather(1, d[:, None])[:, 0],
    eager: lambda p, d: (p.argmax(1) == d).double(),
}


def guesses(begins: list[Tokens]) -> torch.Tensor:
    """Both drafts of a round that starts after each beginning."""
    ids = torch.tensor([[*prompt(), *begin] for begin in begins])
    drafter, layers = decoder(True).drafter, decoder(True).layer_ids
    with torch.no_grad(), hidden_states(target(), layers) as seen:
        target()(ids, use_cache=False)
    slots = torch.full((len(ids),), ids.shape[1] - 1)
    states = seen.aux(layers)[:, :-1]
    room = new_cache(drafter, ids.shape[1] + 4)
    return draft(drafter, room, ids[:, 1:], states, 0 * slots, slots, num_tokens=2)


def wrongly_after(sampler, begins: list[Tokens]) -> torch.Tensor:
    """The distribution of the next token that a wrong sampler with K = 2 has, exactly."""
    p = after(begins)
    if begins == [()]:  # the prompt's own next token needs no drafts
        return p

    def mixed(d):
        chance = CHANCE[sampler](p, d)[:, None]
        return chance * torch.nn.functional.one_hot(d, p.shape[1]) + (1 - chance) * p

    fresh = mixed(guesses(begins)[:, 0])
    if len(begins[0]) == 1:
        return fresh
    # The second of three: it may be a draft that was kept, and then the round goes on.
    firsts = [begin[:1] for begin in begins]
    earlier, given, last = guesses(firsts), after(firsts), torch.tensor(begins)[:, 1]
    chance = CHANCE[sampler](given, earlier[:, 0])
    reached = chance + (1 - chance) * given.gather(1, last[:, None])[:, 0]
    kept = ((earlier[:, 0] == last) * chance / reached)[:, None]
    return kept * mixed(earlier[:, 1]) + (1 - kept) * fresh


@pytest.mark.parametrize("sampler", CHANCE, ids=lambda sampler: sampler.__name__)
def test_wrong_samplers_are_rejected_with_the_power_that_was_computed(sampler, monkeypatch):
    known = cells(DRAWS)
    wrong = probabilities(lambda begins: wrongly_after(sampler, begins), known, length=LENGTH)
    away, freedom = distance(wrong, known), len(known) - 1
    assert power(away, draws=DRAWS, freedom=freedom, significance=SIGNIFICANCE) > 0.99
    monkeypatch.setattr("peagle.decode.decoder.verify", sampler)
    tokens, _ = drawn(True, 2, DRAWS)
    assert chi_square(tokens, known) > critical(freedom, SIGNIFICANCE)
    its_own = pooled(wrong, DRAWS)
    assert chi_square(tokens, its_own) < critical(len(its_own) - 1, SIGNIFICANCE)
