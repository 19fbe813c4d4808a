"""Attention of a block of rows to slots that all of them see: most of what attention is.

The flash kernel does it, or the products of ``unmasked.py``: where they are the faster of the two
(``kernel.by_products``), and where rows have one query for each place. Those of layer 0 do (all of
them read the mask token and differ in rotation only), so that it is attended from each place once,
however many rows of other anchors stand there.
"""

import torch
from jaxtyping import Float
from torch import Tensor

import peagle.kernels.cpu.flash_kernel as kernel
from peagle.kernels.cpu.attention_tiles import Places
from peagle.kernels.cpu.gemm_attention import weigh, weigh_backward

# Sums of weights. In bf16 a slot that outweighed all before by more would be three per cent off.
MOST = {torch.bfloat16: 2e4}
MOST_ELSE = 1e15
LEAST = 1e-30  # a sum of weights that adds nothing and can be divided by


def attend(
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "R G S E"],
    value: Float[Tensor, "R G S E"],
    norm: Float[Tensor, "R G T"],
    places: Places | None,
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "R G T"]]:
    """What the rows attend to, and the log-sum-exp of their scores.

    ``norm`` is the log-sum-exp of what they have attended to before. With ``places`` rows of one
    place have one query.
    """
    if places is None:
        if kernel.by_products(query):
            return by_weights(query, key, value, norm)
        return kernel.attend(query, key, value)
    first = query.index_select(2, places.first)
    found = by_weights(first, key, value, lowest(norm, places))
    return tuple(x.index_select(2, places.of) for x in found)


def by_weights(
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "R G S E"],
    value: Float[Tensor, "R G S E"],
    norm: Float[Tensor, "R G T"],
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "R G T"]]:
    """By products, unless a slot weighs too much beside ``norm``."""
    gained, weight = weigh(query, key[:1], value[:1], norm)
    if weight.amax() <= MOST.get(query.dtype, MOST_ELSE):  # not so if it is infinite
        weight.clamp_(min=LEAST)
        return gained.div_(weight[..., None]), weight.log_().add_(norm)
    return kernel.attend(query, key, value)


def attend_backward(
    grad: Float[Tensor, "R G T E"],
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "R G S E"],
    value: Float[Tensor, "R G S E"],
    out: Float[Tensor, "R G T E"],
    norm: Float[Tensor, "R G T"],
    places: Places | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the latter two of all heads together, or of each.

    ``out`` and ``norm`` are of all that the rows see. With ``places`` the first row of each place
    is given the gradient of all its rows' queries.
    """
    if places is None and not kernel.by_products(query):
        return kernel.attend_backward(grad, query, key, value, out, norm)
    shift = (grad.to(norm.dtype) * out).sum(-1)
    if places is None:
        return weigh_backward(grad, query, key[:1], value[:1], shift, norm)
    # A row's weights are those of its place beside the lowest norm there, times its share.
    low = lowest(norm, places)
    share = (low.index_select(2, places.of) - norm).exp_()
    first = query.index_select(2, places.first)
    onward = torch.zeros_like(first, dtype=norm.dtype)
    onward.index_add_(2, places.of, grad * share[..., None])
    shifts = torch.zeros_like(low).index_add_(2, places.of, shift * share)
    found = weigh_backward(onward.to(grad.dtype), first, key[:1], value[:1], shifts, low)
    for_query = torch.zeros_like(query, dtype=norm.dtype)
    return for_query.index_copy_(2, places.first, found[0]), *found[1:]


def lowest(norm: Float[Tensor, "R G T"], places: Places) -> Float[Tensor, "R G U"]:
    """The smallest norm at each place, beside which no other row's weights are lost."""
    found = norm.index_select(2, places.first)
    return found.scatter_reduce_(2, places.of.expand_as(norm), norm, "amin")
