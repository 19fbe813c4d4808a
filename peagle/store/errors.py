"""What is wrong with a store: a file of it, or one sample; and errors of libraries in one line."""

from pathlib import Path


class StoreError(ValueError):
    """Something of a store is not as captured.

    Args:
        place: where: a folder, an address, a sample.
        problem: what is wrong there.
        remedy: what to do.
    """

    def __init__(self, place: Path | str, problem: str, remedy: str = "capture again"):
        super().__init__(f"{place}: {problem}: {remedy}")
        self.place, self.problem = place, problem


class BadSample(StoreError):  # noqa: N818 (what it is, not that it is one)
    """One sample cannot be used as it was captured; ``place`` names it and its shard."""


def reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
