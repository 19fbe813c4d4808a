"""NTP and MTP against a flat masked form and against a replay of vLLM's slots."""

import pytest
import torch
from dense_form import AUX, assert_ntp_and_mtp_equal, dense_layers, documents
from random_parts import VOCABULARY, make_drafter

from peagle.cod.mask import visible
from peagle.cod.sampling import Cod, Rows, sample_rows
from peagle.decode.drafting import draft, new_cache
from peagle.kernels.cpu import attention_tiles


def flat_form(drafter, rows, document, position, tokens, aux):
    """Every row, all depths at once, in one sequence under the dense mask of the one rule."""
    known = rows.depth == 0
    mask_state, mask_embedding = drafter.mask_inputs(drafter.ops)
    anchor = drafter.combine(aux, drafter.ops)[rows.anchor]
    hidden = torch.where(known[:, None], anchor, mask_state + added(drafter, anchor, rows.depth))
    embedding = torch.where(
        known[:, None], drafter.embed_tokens(tokens)[rows.anchor], mask_embedding
    )
    angles = drafter.rotary.angles(position[rows.anchor] + rows.depth, hidden.dtype)
    seen = visible(rows, rows, document)
    return dense_layers(drafter, hidden, embedding, angles, seen)


def added(drafter, anchor, depth):
    """The formulas of the paper's appendix B.2, row by row, without dropout."""
    design, extra = drafter.config.hidden_state, torch.zeros_like(anchor)
    for row, (state, d) in enumerate(zip(anchor, depth.tolist(), strict=True)):
        if "anchor" in design:
            factor = drafter.row_states.scale if design == "anchor_scaled" else 1
            extra[row] += factor * drafter.row_states.project.weight @ state
        if "depth" in design:
            extra[row] += drafter.row_states.by_depth.weight[d]
    return extra


def all_rows(document, cod):
    """Depth 0 everywhere (as context) and a draw of deeper rows."""
    return sample_rows(
        torch.ones(len(document), dtype=torch.bool),
        document,
        cod=cod,
        generator=torch.Generator().manual_seed(1),
    )


@pytest.mark.parametrize("lengths", [(40,), (7, 1, 25, 2)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 4},
        {"norm_before_residual": True},
        {"norm_before_fc": True},
        {"fc_norm": True},
        {"draft_vocab_size": 20},
        {"hidden_state": "depth"},
        {"hidden_state": "anchor"},
        {"hidden_state": "anchor_depth"},
        {"hidden_state": "anchor_scaled"},
    ],
    ids=lambda changes: "+".join(f"{key} {value}" for key, value in changes.items()) or "plain",
)
def test_ntp_and_mtp_equal_the_flat_masked_form(lengths, changes, monkeypatch):
    for name, value in (("DIAGONAL_ROWS", 16), ("DIAGONAL_SLOTS", 4), ("UNIT", 4)):
        monkeypatch.setattr(attention_tiles, name, value)  # several tiles, also within a document
    drafter = make_drafter(**changes).eval()
    document, position, tokens, aux = documents(*lengths)
    rows = all_rows(document, Cod(5, 0.8))
    deep = rows.depth > 0
    assert deep.sum() > 32
    assert attention_tiles.tile_rollouts(rows.mtp(), document).full  # tiles that need no mask

    expected = flat_form(drafter, rows, document, position, tokens, aux)
    found = (document, position, tokens, aux)
    assert_ntp_and_mtp_equal(drafter, rows, found, lengths, expected)


def test_a_segment_may_hold_a_single_rollout_of_many_rows():
    drafter = make_drafter()
    document, position, tokens, aux = documents(9)
    context = Rows(torch.arange(9), torch.zeros(9, dtype=torch.long))
    rollout = Rows(torch.full((4,), 3), torch.arange(1, 5))
    rows = Rows(*(torch.cat(pair) for pair in zip(context, rollout, strict=True)))
    ntp = drafter.ntp_forward(tokens, aux, position, document_lengths=[9])
    expected = flat_form(drafter, rows, document, position, tokens, aux)[9:]
    assert torch.allclose(
        drafter.mtp_forward(rollout, ntp, position, document, drafter.ops), expected
    )


@pytest.mark.parametrize("design", ["shared", "anchor_depth", "anchor_scaled"])
def test_training_rows_equal_a_drafting_pass_in_vllms_slot_layout(design):
    """For every anchor, drafting with a cache gives what training computes for its rollout."""
    drafter, depths = make_drafter(num_hidden_layers=3, hidden_state=design).eval(), 4
    document, position, tokens, aux = documents(12)
    rows = sample_rows(
        torch.ones(12, dtype=torch.bool), document, cod=Cod(depths, 1.0), generator=None
    )
    ntp = drafter.ntp_forward(tokens, aux, position, document_lengths=[12])
    mtp = drafter.mtp_forward(rows.mtp(), ntp, position, document, drafter.ops)
    trained = {}
    for row, state in zip(zip(*rows.mtp(), strict=True), mtp, strict=True):
        trained[tuple(map(int, row))] = drafter.logits(state[None]).argmax().item()
    for anchor in range(12):
        trained[anchor, 0] = drafter.logits(ntp.hidden[anchor][None]).argmax().item()

    cache = new_cache(drafter, 32)
    known = 0
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
        )
        known = anchor + 1
        assert guesses[0].tolist() == [trained[anchor, depth] for depth in range(depths)]


def test_rows_of_a_batch_do_not_disturb_each_other_in_drafting():
    drafter = make_drafter()
    tokens = torch.randint(0, VOCABULARY, (3, 9))
    aux = torch.randn(3, 9, AUX, dtype=torch.float64)
    count = torch.tensor([9, 4, 6])
    start = torch.zeros(3, dtype=torch.long)
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


def test_a_guess_depends_on_its_position():
    drafter = make_drafter()
    _, position, tokens, aux = documents(10)
    near = drafter.ntp_forward(tokens, aux, position, document_lengths=[10]).hidden
    stretched = drafter.ntp_forward(tokens, aux, position * 3, document_lengths=[10]).hidden
    assert torch.allclose(near[0], stretched[0])  # alone, a slot has nobody to be distant from
    assert not torch.allclose(near[5], stretched[5])


def test_the_rule_of_visibility_is_the_table_of_its_docstring():
    rows = Rows(torch.tensor([0, 1, 2, 1, 1, 2]), torch.tensor([0, 0, 0, 1, 2, 1]))
    query = Rows(torch.tensor([2, 1, 2]), torch.tensor([0, 2, 1]))
    seen = visible(query, rows, torch.zeros(3, dtype=torch.long)).int().tolist()
    assert seen == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1]]


def test_guesses_of_a_pruned_vocabulary_come_back_as_target_ids():
    drafter = make_drafter(draft_vocab_size=3)
    kept = torch.tensor([4, 17, 30])
    drafter.d2t.copy_(kept - torch.arange(3))
    assert drafter.target_ids(torch.tensor([2, 0, 1])).tolist() == [30, 4, 17]
