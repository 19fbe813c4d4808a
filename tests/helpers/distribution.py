"""Chi-square tests of sampled continuations against a distribution that is known exactly."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

LEAST = 5  # draws that a cell must expect
Tokens = tuple[int, ...]
Conditional = Callable[[list[Tokens]], Tensor]  # probabilities of the token after each beginning


def cells_of(conditional: Conditional, *, length: int, draws: int) -> dict[Tokens, float]:
    """Continuations that are expected often enough, with their probabilities.

    A cell that is shorter than ``length`` holds what begins with it and has no cell of its own.
    """
    cells: dict[Tokens, float] = {}
    known = {(): 1.0}
    for _ in range(length):
        following = {}
        for begin, p in zip(known, conditional(list(known)).tolist(), strict=True):
            mass = known[begin]
            often = {(*begin, t): mass * q for t, q in enumerate(p) if draws * mass * q >= LEAST}
            cells[begin] = mass - sum(often.values())
            following |= often
        known = following
    return pooled(cells | known, draws)


def pooled(cells: Mapping[Tokens, float], draws: int) -> dict[Tokens, float]:
    """Each cell that expects too few draws goes to the longest cell that it begins with."""
    found = dict(cells)
    for cell in sorted(cells, key=len, reverse=True):
        if cell and draws * found[cell] < LEAST:
            mass = found.pop(cell)
            found[place(cell, found)] += mass
    assert draws * found[()] >= LEAST and abs(sum(found.values()) - 1) < 1e-9
    return found


def probabilities(
    conditional: Conditional, cells: Iterable[Tokens], *, length: int
) -> dict[Tokens, float]:
    """Another distribution over the same cells."""
    cells = set(cells)
    begins = {cell[:n] for cell in cells for n in range(len(cell) + 1)}
    known, found = {(): 1.0}, dict.fromkeys(cells, 0.0)
    for _ in range(length):
        following = {}
        for begin, p in zip(known, conditional(list(known)).tolist(), strict=True):
            own = {(*begin, t): known[begin] * q for t, q in enumerate(p)}
            following |= {cell: mass for cell, mass in own.items() if cell in begins}
            rest = known[begin] - sum(following.get(cell, 0.0) for cell in own)
            found[place(begin, cells)] += rest
        known = following
    for cell, mass in known.items():
        found[place(cell, cells)] += mass
    return found


def place(tokens: Tokens, cells: Iterable[Tokens]) -> Tokens:
    """The longest beginning that is a cell."""
    return next(tokens[:n] for n in range(len(tokens), -1, -1) if tokens[:n] in cells)


def chi_square(drawn: list[list[int]], cells: Mapping[Tokens, float]) -> float:
    """Of observed against expected counts."""
    seen = Counter(place(tuple(tokens), cells) for tokens in drawn)
    expected = {cell: len(drawn) * p for cell, p in cells.items()}
    return sum((seen[cell] - n) ** 2 / n for cell, n in expected.items())


def distance(q: Mapping[Tokens, float], p: Mapping[Tokens, float]) -> float:
    """Chi-square distance of q from p; at least four times the square of total variation."""
    return sum((q[cell] - p[cell]) ** 2 / p[cell] for cell in p)


def tail(value: float, freedom: float | Tensor) -> Tensor:
    """Chance that a chi-square variable is larger."""
    half = torch.as_tensor(freedom, dtype=torch.float64) / 2
    return torch.special.gammaincc(half, torch.full_like(half, value / 2))


def critical(freedom: int, significance: float) -> float:
    """What a chi-square variable exceeds with this chance."""
    low, high = 0.0, 10.0 * freedom + 100
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, freedom) > significance else (low, middle)
    return high


def power(away: float, *, draws: int, freedom: int, significance: float) -> float:
    """Chance to reject a distribution at this chi-square distance: the tail of a noncentral
    chi-square variable, which is a Poisson mixture of central ones."""
    half = draws * away / 2
    terms = torch.arange(int(half + 20 * half**0.5 + 50), dtype=torch.float64)
    weight = torch.exp(terms * math.log(half) - half - torch.lgamma(terms + 1))
    return float((weight * tail(critical(freedom, significance), freedom + 2 * terms)).sum())
