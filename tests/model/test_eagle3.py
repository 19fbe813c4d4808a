"""EAGLE-3's rollouts and drafting against a replay of one pass per token."""

import pytest
import torch
from dense_form import AUX, assert_ntp_and_mtp_equal, dense_layers, documents
from random_parts import VOCABULARY, WIDTH, make_drafter, make_target

from peagle.cod.sampling import Cod, Rows, sample_rows
from peagle.decode.drafting import draft, new_cache
from peagle.model import eagle3
from peagle.model.eagle3 import Eagle3Drafter
from peagle.model.initial_weights import initialise
from peagle.model.p_eagle import PEagleDrafter
from peagle.target.head import target_head_of
from peagle.target.layers import target_layers_of


def make_eagle3(**changes):
    return make_drafter(parallel_drafting=False, **changes)


def whole_pass(drafter, hidden, embedding):
    """All layers over one sequence from position 0 under a dense causal mask."""
    count = len(hidden)
    angles = drafter.rotary.angles(torch.arange(count), hidden.dtype)
    seen = torch.ones(count, count).tril().bool()
    return dense_layers(drafter, hidden, embedding, angles, seen)


def step_by_step(drafter, anchor, depths, tokens, aux):
    """Last states of the rows (anchor, 0..depths-1) of one document, whole passes only."""
    hidden = drafter.combine(aux[: anchor + 1], drafter.ops)
    states = []
    for depth in range(depths):
        embedding = drafter.embed_tokens(tokens[: anchor + depth + 1])
        states.append(whole_pass(drafter, hidden, embedding)[-1])
        hidden = torch.cat([hidden, states[-1][None]])
    return states


def replayed(drafter, rows, document, tokens, aux):
    """Every row's last state, rollout by rollout."""
    found = []
    for anchor, depths in zip(*torch.unique(rows.anchor, return_counts=True), strict=True):
        begin = int(torch.searchsorted(document, document[anchor]))
        found += step_by_step(drafter, int(anchor) - begin, depths, tokens[begin:], aux[begin:])
    return torch.stack(found)


def all_rows(document, cod):
    generator = torch.Generator().manual_seed(1)
    supervised = torch.ones(len(document), dtype=torch.bool)
    return sample_rows(supervised, document, cod=cod, generator=generator)


@pytest.mark.parametrize(
    ("lengths", "keep_ratio", "changes"),
    [
        ((18,), 1.0, {}),
        ((5, 1, 14, 2), 1.0, {}),
        ((5, 1, 14, 2), 0.7, {}),  # some rollouts end before others
        ((4, 9), 1.0, {"num_hidden_layers": 1, "norm_before_residual": True}),
        ((4, 9), 1.0, {"num_hidden_layers": 3, "fc_norm": True, "draft_vocab_size": 20}),
    ],
    ids=["one document", "several", "thinned", "one layer", "three layers"],
)
def test_rollouts_equal_one_pass_after_the_other(lengths, keep_ratio, changes, monkeypatch):
    monkeypatch.setattr(eagle3, "BLOCK_ROWS", 4)  # several blocks within a document
    drafter = make_eagle3(**changes)
    document, position, tokens, aux = documents(*lengths)
    rows = all_rows(document, Cod(5, keep_ratio))
    deep = rows.depth > 0
    assert deep.sum() > 16

    expected = replayed(drafter, rows, document, tokens, aux)
    found = (document, position, tokens, aux)
    assert_ntp_and_mtp_equal(drafter, rows, found, lengths, expected)


def test_a_row_reads_the_token_before_the_one_it_guesses_and_none_after():
    drafter = make_eagle3()
    document, position, tokens, aux = documents(9)
    rows = Rows(torch.full((3,), 2), torch.arange(1, 4))

    def states(tokens):
        ntp = drafter.ntp_forward(tokens, aux, position, document_lengths=[9])
        return drafter.mtp_forward(rows, ntp, position, document, drafter.ops)

    changed = tokens.clone()
    changed[4] = (changed[4] + 1) % VOCABULARY  # slot 4: the row (2, 2) reads it
    same = (states(tokens) == states(changed)).all(-1)
    assert same.tolist() == [True, False, False]


def test_training_rows_equal_drafting_when_its_guesses_are_the_tokens():
    drafter, depths = make_eagle3(num_hidden_layers=3), 4
    document, position, tokens, aux = documents(14)
    cache, known = new_cache(drafter, 32), 0
    for anchor in (2, 3, 6, 8):  # slots come in as verifications accept 3, 1, 3, 2 of them
        new = slice(known, anchor + 1)
        guesses = draft(
            drafter,
            cache,
            tokens[None, new],
            aux[None, new],
            torch.tensor([known]),
            torch.tensor([anchor + 1 - known]),
            num_tokens=depths,
        )[0]
        known = anchor + 1
        believed = tokens.clone()
        believed[anchor + 1 : anchor + depths] = guesses[:-1]
        rows = Rows(torch.full((depths - 1,), anchor), torch.arange(1, depths))
        ntp = drafter.ntp_forward(believed, aux, position, document_lengths=[14])
        mtp = drafter.mtp_forward(rows, ntp, position, document, drafter.ops)
        states = torch.cat([ntp.hidden[anchor][None], mtp])
        assert guesses.tolist() == drafter.logits(states).argmax(-1).tolist()


def test_rows_of_a_batch_do_not_disturb_each_other_in_drafting():
    drafter = make_eagle3(draft_vocab_size=20)
    tokens = torch.randint(0, VOCABULARY, (3, 9))
    aux = torch.randn(3, 9, AUX, dtype=torch.float64)
    count, start = torch.tensor([9, 4, 6]), torch.zeros(3, dtype=torch.long)
    together = draft(drafter, new_cache(drafter, 20), tokens, aux, start, count, num_tokens=4)
    for row, length in enumerate(count.tolist()):
        alone = draft(
            drafter,
            new_cache(drafter, 20),
            tokens[row : row + 1, :length],
            aux[row : row + 1, :length],
            start[:1],
            count[row : row + 1],
            num_tokens=4,
        )
        assert torch.equal(alone[0], together[row])


def test_it_starts_with_the_targets_embedding_norm_and_head_and_its_deepest_state():
    target, drafter = make_target(), make_eagle3(num_hidden_layers=1)
    head = target_head_of(target, target.config)
    layers = target_layers_of(target, target.config, (0, 3))
    before = drafter.fc.weight.detach().clone()
    assert initialise(drafter, head, torch.arange(VOCABULARY), layers) == []
    assert torch.equal(drafter.embed_tokens.weight, head.embedding.double())
    assert torch.equal(drafter.lm_head.weight, head.head.double())
    assert torch.equal(drafter.norm.weight, head.norm.double())
    added = drafter.fc.weight - before
    assert torch.allclose(added[:, -WIDTH:], torch.eye(WIDTH).double())
    assert not added[:, :-WIDTH].any()


def test_neither_kind_takes_the_configuration_of_the_other(tmp_path):
    parallel, one_by_one = make_drafter(), make_eagle3()
    assert (parallel.config.method, one_by_one.config.method) == ("p-eagle", "eagle3")
    with pytest.raises(ValueError, match="of an eagle3 drafter, not of a p-eagle one"):
        PEagleDrafter(one_by_one.config)
    one_by_one.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of an eagle3 drafter"):
        PEagleDrafter.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of a p-eagle drafter, not of an eagle3 one"):
        Eagle3Drafter(parallel.config)
