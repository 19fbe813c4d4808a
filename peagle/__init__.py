"""P-EAGLE drafters: train, prove, publish, serve.

One vocabulary, used everywhere:

target       the big model whose output must not change
drafter      our model; guesses the next K tokens in one pass
position     index of a token in its document
anchor       the last real position that a guess is made from
depth        how far a guess reaches past its anchor: 0 is the next token
row          one guess: an (anchor, depth) pair
rollout      the rows of one anchor, a hole-free prefix 0..d of the depths
segment      a range of anchors with about as many rows as may be trained at a time
piece        the rows trained in one backward pass: segments, cut anew once rows are drawn
document     one conversation; several are packed into a sequence
supervised   counts towards the loss: the token read and the token guessed are the assistant's
COD          conditional drop-token sampling: deeper depths keep geometrically fewer rows
acceptance   tokens gained per verification by the target, the bonus token included
length

Letters: S positions, N rows, K depths, D width, A captured target layers, V target vocabulary,
W draft vocabulary.
"""

__version__ = "0.1.0"
