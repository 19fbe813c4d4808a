"""Where a number comes from: versions, machine, command. Goes into every file of figures."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peagle.kernels.device import cpu_name, gpu_name

PACKAGES = ("torch", "lightning", "transformers")


def environment() -> dict[str, Any]:
    """Versions and machine of this process; what cannot be known is ``None``."""
    return {
        "peagle": installed("peagle"),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": gpu_name(),
        "git_commit": git_commit(),
        "command": shlex.join(["python", "-m", "peagle", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the source this package runs from, if it is a checkout and git is installed.

    An environment often lies inside the checkout of another project: its commit says nothing.
    """
    if (git := shutil.which("git")) is None:
        return None
    command = [git, "rev-parse", "--show-prefix", "HEAD"]
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    place, _, commit = result.stdout.strip().partition("\n")
    return commit if result.returncode == 0 and place == "peagle/card/" else None
