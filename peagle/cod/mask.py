"""Which row sees which: the one rule that every attention path is tested against."""

from jaxtyping import Bool, Int
from torch import Tensor

from peagle.cod.sampling import Rows


def visible(query: Rows, key: Rows, document: Int[Tensor, " S"]) -> Bool[Tensor, "Q N"]:
    """Whether each query row sees each key row (vLLM's causal order over slots).

    A row sees the depth-0 rows of its document up to its anchor, and the rows of its own rollout
    up to itself. Rows of other rollouts are guesses that serving would never have in its cache.

                       keys (anchor, depth)
        query          0,0  1,0  2,0  1,1  1,2  2,1
        (2, 0)          x    x    x    .    .    .
        (1, 2)          x    x    .    x    x    .
        (2, 1)          x    x    x    .    .    x
    """
    anchor, depth = query.anchor[:, None], query.depth[:, None]
    prefix = (key.depth == 0) & (key.anchor <= anchor)
    own = (key.anchor == anchor) & (key.depth <= depth)
    return (document[query.anchor][:, None] == document[key.anchor]) & (prefix | own)
