"""The environment that other programs get: as the user set it, without peagle's own settings."""

import os

from peagle.kernels.cpu.products import CACHE_LIMITS


def users_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in CACHE_LIMITS}
