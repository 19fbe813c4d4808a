"""What happens to damaged samples: the run stops, or leaves them out within a budget."""

import sys


class BadSamples:
    """Counts and names the damaged samples of a run, each once.

    Args:
        skip: leave them out instead of stopping at the first.
        budget: share of the store's samples that may be left out.
    """

    def __init__(self, *, skip: bool, budget: float):
        if not 0 <= budget <= 1:
            raise ValueError(f"bad_sample_budget must lie in 0..1, got {budget}")
        self.skip, self.budget = skip, budget
        self.samples = 0  # of the store
        self.found: dict[str, None] = {}  # an ordered set

    @property
    def allowed(self) -> int:
        return int(self.budget * self.samples)

    def admit(self, problem: str) -> None:
        """Take note of one damaged sample.

        Raises:
            ValueError: if it may not be left out.
        """
        if not self.skip:
            raise ValueError(f"{problem} (data.on_bad_sample: skip would leave it out)")
        if problem in self.found:
            return
        self.found[problem] = None
        print(f"left out: {problem} ({len(self.found)} of {self.allowed})", file=sys.stderr)
        if len(self.found) > self.allowed:
            raise ValueError(
                f"{len(self.found)} samples are damaged, and bad_sample_budget = {self.budget:g} "
                f"allows {self.allowed} of {self.samples}; the last one: {problem}"
            )
