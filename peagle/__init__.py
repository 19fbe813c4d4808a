"""P-EAGLE drafters: train, prove, publish, serve.

One vocabulary, used everywhere:

target       the big model whose output must not change
drafter      our model; guesses the next K tokens in one pass
position     index of a token in its document
slot         place of a drafter's input, in vLLM's order: slot p reads the target's hidden state of
             position p and the token of p + 1, and guesses the token of p + 2
anchor       the last real position that a guess is made from
depth        how far a guess reaches past its anchor: 0 is the next token
row          one guess: an (anchor, depth) pair
rollout      the rows of one anchor, a hole-free prefix 0..d of the depths
NTP          next-token prediction: the rows of depth 0, which read real hidden states
MTP          multi-token prediction: the rows of depth >= 1, which read the mask token
segment      a range of anchors with about as many rows as may be trained at a time
piece        the rows trained in one backward pass: segments, cut anew once rows are drawn
main_grad    a tensor's gradient, accumulated over the pieces of a step
lse          log-sum-exp of a row's attention scores or logits; *norm* always means RMSNorm
document     one conversation; several are packed into a sequence
supervised   counts towards the loss: the token read and the token guessed are the assistant's
COD          conditional drop-token sampling: deeper depths keep geometrically fewer rows
acceptance   tokens gained per verification by the target, the bonus token included
length

Letters: S positions, N rows, K depths, D width, A captured target layers, V target vocabulary,
W draft vocabulary.

What a Python script needs is importable from here: ``from peagle import PEagleModule``. Names are
loaded when they are first used, so ``import peagle`` is quick. ``docs/python.md`` has an example.
"""

from importlib import import_module

__version__ = "0.4.0"

# Public name -> where it is defined. ``capture`` is a subpackage, so its function has another name.
PUBLIC = {
    "TargetSource": "peagle.target.target",
    "PromptSource": "peagle.capture.prompts",
    "CaptureConfig": "peagle.capture.config",
    "capture_store": "peagle.capture.capture:capture",
    "Store": "peagle.store.reader",
    "HiddenStatesDataModule": "peagle.train.datamodule",
    "PEagleModule": "peagle.train.module",
    "Cod": "peagle.cod.sampling",
    "MuonAdamW": "peagle.train.optimizer",
    "LinearSchedule": "peagle.train.schedule",
    "PEagleConfig": "peagle.model.config",
    "PEagleDrafter": "peagle.model.p_eagle",
    "Eagle3Drafter": "peagle.model.eagle3",
    "load_drafter": "peagle.model.saved_drafter",
    "Decoder": "peagle.decode.decoder",
    "EvaluationConfig": "peagle.decode.evaluation",
    "export_drafter": "peagle.serve.export",
    "Verifier": "peagle.serve.export",
    "publish_run": "peagle.publish.publish",
}

__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> object:
    """Load a public name when it is first used (PEP 562)."""
    if name not in PUBLIC:
        raise AttributeError(f"module 'peagle' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
