"""What peagle sets in its environment, and the environment that other programs get without it.

oneDNN and its wrapper keep the code that they made for the last 1,024 shapes each. Every step has
numbers of rows of its own, so most of that code is never used again: on the quickstart it grew to a
gigabyte. Both libraries read their limits when they are first used, so ``choose.py`` imports this
file before anything is computed.
"""

import os

# As many as a layer of a segment has, forward and back, so that the layers share them. What a user
# has set stays.
CACHE_LIMITS = {
    name: "48"
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    if name not in os.environ
}
os.environ.update(CACHE_LIMITS)


def users_environment() -> dict[str, str]:
    """The environment as the user set it."""
    return {name: value for name, value in os.environ.items() if name not in CACHE_LIMITS}
