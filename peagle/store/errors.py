"""What is wrong with a store: a file of it, or one sample; and errors of libraries in one line."""

from pathlib import Path


class DamageError(ValueError):
    """A file of a store is not as captured. ``problem`` is what is wrong, without where."""

    def __init__(self, place: Path | str, problem: str, remedy: str = "capture again"):
        super().__init__(f"{place}: {problem}: {remedy}")
        self.problem = problem


class BadSample(ValueError):  # noqa: N818 (what it is, not that it is one)
    """One sample cannot be used as it was captured; the message names it and its shard.

    Args:
        problem: all of the message but what to do.
        remedy: what to do.
    """

    def __init__(self, problem: str, remedy: str = "capture again"):
        super().__init__(f"{problem}: {remedy}")
        self.problem = problem


def reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
