"""What tests of both kinds of drafter share: random documents, and dense attention in float64."""

import math

import torch
from random_parts import LAYER_IDS, VOCABULARY, WIDTH

from peagle.kernels.reference import Reference

AUX = len(LAYER_IDS) * WIDTH


def documents(*lengths):
    document = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    position = torch.cat([torch.arange(n) for n in lengths])
    tokens = torch.randint(0, VOCABULARY, (len(document),))
    aux = torch.randn(len(document), AUX, dtype=torch.float64)
    return document, position, tokens, aux


def dense_layers(drafter, hidden, embedding, angles, seen):
    """All layers over one sequence; ``seen`` says which row sees which."""
    ops = Reference()
    for layer in drafter.layers:
        x, residual = layer.enter(hidden, embedding, ops)
        query, key, value = layer.self_attn(x, ops)
        query, key = ops.rotate(query, angles), ops.rotate(key, angles)
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        scores = torch.einsum("qhe,khe->hqk", query, key) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        context = torch.einsum("hqk,khe->qhe", weights, value)
        hidden, embedding = layer.leave(residual, context, ops), None
    return hidden


def assert_ntp_and_mtp_equal(drafter, rows, documents, lengths, expected):
    """States of NTP and MTP, and the gradients of all that makes them."""
    document, position, tokens, aux = documents
    deep = rows.depth > 0
    ntp = drafter.ntp_forward(tokens, aux, position, document_lengths=list(lengths))
    mtp = drafter.mtp_forward(rows.mtp(), ntp, position, document, drafter.ops)
    assert torch.allclose(ntp.hidden, expected[~deep], atol=1e-9)
    assert torch.allclose(mtp, expected[deep], atol=1e-9)

    weights = torch.randn_like(expected)
    parameters = [p for n, p in drafter.named_parameters() if not n.startswith(("norm", "lm_"))]
    wanted = torch.autograd.grad((expected * weights).sum(), parameters)
    ours = (ntp.hidden * weights[~deep]).sum() + (mtp * weights[deep]).sum()
    for got, want in zip(torch.autograd.grad(ours, parameters), wanted, strict=True):
        assert torch.allclose(got, want, rtol=1e-7, atol=1e-9)
