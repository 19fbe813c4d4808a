"""Where rounds of drafting start in a text, and training that looks there."""

import lightning as L
import pytest
import torch
from short_fits import BASELINE, make_data, make_module, make_trainer
from trained_drafters import COD, embedded_target, token_ids, trained_drafter

from peagle.cod.rounds import right_prefix, round_starts
from peagle.cod.sampling import Cod, Rows, rows_of, sample_rows
from peagle.cod.segments import Segment
from peagle.decode.decoder import Decoder
from peagle.store.sample import Sample
from peagle.target.target import TargetSource, decoder_layers, hidden_states, target_head_of
from peagle.train.objective import objective
from peagle.train.packing import Batch, pack


def starts_of(right, lengths, *, supervised=None, document=None):
    """Slots where rounds start; anchor ``a`` has ``lengths[a]`` rows, the first ``right[a]`` of
    which are right, the next wrong, and the others right again."""
    rows = rows_of(torch.tensor(lengths))
    correct = rows.depth != torch.tensor(right)[rows.anchor]
    supervised = torch.tensor(supervised or [True] * len(right))
    document = torch.tensor(document or [0] * len(right))
    assert right_prefix(rows, correct, len(right)).tolist() == right
    return torch.nonzero(round_starts(rows, correct, supervised, document)).flatten().tolist()


def test_a_round_starts_after_the_right_guesses_and_one_more_token():
    assert starts_of([2, 0, 1, 0, 0, 3, 1], [3] * 7) == [0, 3, 4, 5]
    assert starts_of([0] * 5, [3] * 5) == [0, 1, 2, 3, 4]
    assert starts_of([3] * 9, [3] * 9) == [0, 4, 8]


def test_every_answer_and_every_document_starts_anew():
    document = [0, 0, 0, 1, 1, 1, 1]
    assert starts_of([3, 3, 3, 1, 3, 3, 3], [3] * 7, document=document) == [0, 3, 5]
    supervised = [False, True, True, False, False, True, True]
    lengths = [0, 2, 1, 0, 0, 2, 1]
    assert starts_of([0, 2, 1, 0, 0, 0, 1], lengths, supervised=supervised) == [1, 5, 6]
    assert starts_of([0, 0], [0, 0], supervised=[False, False]) == []


BEGINNINGS = ("for key, value in ", "import ", "def f(self):\n    return ", "self._", "\n    if ")


def text_batch(target, layers, prompts, answers):
    """Each prompt and its answer as a document; answers are supervised from their first token."""
    samples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([*prompt, *answer])
        with torch.no_grad(), hidden_states(target, layers) as seen:
            target(ids[None], use_cache=False)
        final = seen.entering[len(decoder_layers(target))][0]
        samples.append(
            Sample(ids, torch.arange(len(ids)) >= len(prompt), seen.aux(layers)[0], final)
        )
    packed = pack(samples)
    return Batch(**packed, segments=(Segment(0, len(packed["tokens"])),), seed=0)


@pytest.mark.parametrize("parallel", [True, False], ids=["p-eagle", "eagle3"])
def test_the_rounds_of_a_text_are_those_that_decoding_it_makes(parallel):
    target, drafter = embedded_target(), trained_drafter(parallel_drafting=parallel)
    prompts = [list(token_ids(text)) for text in BEGINNINGS]
    decoded = Decoder(target, drafter, eos_ids=set()).decode(
        prompts, k=COD.num_depths, temperature=0.0, max_new_tokens=24
    )
    every = [n for accepted in decoded.accepted for n in accepted]
    assert min(every.count(0), every.count(1)) > 10, "some rounds go well and some do not"
    layers = tuple(drafter.config.eagle_aux_hidden_state_layer_ids)
    batch = text_batch(target, layers, prompts, decoded.tokens)
    rows = sample_rows(batch.supervised, batch.document, cod=COD, generator=None)
    with torch.no_grad():
        head = target_head_of(target, TargetSource("tiny").config())
        outcome = objective(drafter, head, batch, rows, mix={"kl": 1.0})
    starts = round_starts(rows, outcome.correct, batch.supervised, batch.document)
    first = 0
    for prompt, accepted in zip(prompts, decoded.accepted, strict=True):
        own = starts[first + len(prompt) - 1 : first + len(prompt) + 22 - COD.num_depths]
        expected = torch.tensor([0, *accepted]).cumsum(0) + torch.arange(len(accepted) + 1)
        # Anchors near the end do not have all their rows.
        assert torch.nonzero(own).flatten().tolist() == expected[expected < len(own)].tolist()
        first += len(prompt) + 22


class Drawn(L.Callback):
    """Which rows every step trains."""

    def __init__(self):
        self.rows: list[Rows] = []

    def on_train_start(self, trainer, pl_module):
        reached = pl_module.reached

        def noted(batch, rows):
            self.rows.append(reached(batch, rows))
            self.supervised = int(batch.supervised.sum())
            return self.rows[-1]

        pl_module.reached = noted


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("changes", [{}, BASELINE], ids=["p-eagle", "eagle3"])
def test_training_keeps_every_first_row_and_only_the_rollouts_of_rounds(
    random_store, tmp_path, changes
):
    cod, drawn = Cod(4, 1.0), Drawn()
    module = make_module(cod=cod, deeper_rows="rounds", **changes)
    trainer = make_trainer(tmp_path, 2, callbacks=[drawn])
    trainer.fit(module, datamodule=make_data(random_store, max_tokens=40))
    assert len(drawn.rows) == 2
    for rows in drawn.rows[-1:]:
        counts = torch.bincount(rows.depth, minlength=4).tolist()
        assert counts[0] == drawn.supervised
        # A drafter that knows nothing of random text is refused nearly everywhere.
        assert 0 < counts[3] <= counts[2] <= counts[1] < counts[0]
    assert module.rows_trained == sum(len(rows.anchor) for rows in drawn.rows)


def test_rounds_are_not_looked_for_where_rows_are_dropped():
    with pytest.raises(ValueError, match=r"deeper_rows: rounds needs cod.keep_ratio 1"):
        make_module(cod=Cod(4, 0.8), deeper_rows="rounds")
