"""Reading ``recipes.yaml``, and refusing what could not be measured before anything trains."""

import contextlib
import hashlib
import io
import json
import re
from argparse import ArgumentError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peagle.cli import PEagleCLI, lightning
from peagle.mistakes import sentence
from peagle.store.reader import Store
from peagle.train.sampler import fill_packs

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")  # a folder of its own on every file system
OURS = ("config", "ckpt_path", "run_dir", "store", "target", "revision", "capture", "evaluation",
        "seed_everything", "data.seed", "trainer.max_steps", "trainer.max_epochs",
        "trainer.max_time", "trainer.default_root_dir", "trainer.logger")  # fmt: skip
"""What the benchmark sets itself: equal for all recipes, or a folder that no two share."""
ANSWERS = ("greedy_share", "temperature", "seed")
"""Of ``capture``, what a recipe's ``data`` may name: the same prompts, answered in another way."""


@dataclass(frozen=True)
class Recipe:
    """A configuration with some settings overridden, and perhaps other answers to learn from."""

    name: str
    about: str
    overrides: dict[str, Any]
    data: dict[str, float] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """For the command line of ``fit``."""
        return [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.overrides.items()
        ] + self.capture_arguments()

    def capture_arguments(self) -> list[str]:
        """For the command line of ``capture``, and of ``fit``, which checks its store by them."""
        return [f"--capture.{key}={json.dumps(value)}" for key, value in self.data.items()]

    def fingerprint(self, config: Path) -> str:
        """Of what is trained, wherever and with whichever commit.

        Names, folders and what is only measured afterwards do not count.
        """
        written = yaml.safe_load(config.read_text())
        for key in ("run_dir", "store", "evaluation"):
            written.pop(key, None)
        written.get("trainer", {}).pop("logger", None)
        trained = [written, self.overrides, self.data] if self.data else [written, self.overrides]
        text = json.dumps(trained, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Group:
    """One table."""

    about: str
    recipes: list[str]


class Strict(yaml.SafeLoader):
    """YAML keeps the last of two equal names in silence; both would write to one folder."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is given twice: both would write to one folder")
        return super().construct_mapping(node, deep)


def read_recipes(path: Path) -> tuple[dict[str, Recipe], dict[str, Group]]:
    """Raises ``ValueError`` for a name given twice, one that is no folder's, or a setting that
    the benchmark decides."""
    found = yaml.load(path.read_text(), Strict)
    recipes = {
        str(name): Recipe(
            str(name), entry["about"], entry.get("overrides", {}), entry.get("data", {})
        )
        for name, entry in found["recipes"].items()
    }
    for recipe in recipes.values():
        check_recipe(recipe)
    groups = {
        name: Group(entry["about"], entry["recipes"]) for name, entry in found["groups"].items()
    }
    for name, group in groups.items():
        choose(group.recipes, recipes, f"group {name}")
    return recipes, groups


def check_recipe(recipe: Recipe) -> None:
    if not NAME.fullmatch(recipe.name):
        raise ValueError(f"recipe {recipe.name!r} names its folder: use a-z, 0-9, '.', '_' and '-'")
    for key in recipe.overrides:
        for ours in OURS:
            if key.rstrip("+") == ours or key.startswith(ours + "."):
                raise ValueError(
                    f"recipe {recipe.name!r} sets {key}, which the benchmark decides: all recipes "
                    "share one store and one measurement, and each has a folder of its own"
                )
    for key, value in recipe.data.items():
        if key not in ANSWERS or isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"recipe {recipe.name!r}: data says how the same prompts are answered, by "
                f"numbers for {', '.join(ANSWERS)}, got {key}: {value!r}"
            )


def choose(names: list[str], known: dict[str, Any], place: str) -> None:
    """Raise ``ValueError`` for a name that does not exist."""
    for name in names:
        if name not in known:
            raise ValueError(f"{place}: there is no {name!r}; choose from {', '.join(known)}")


def resolved(recipe: Recipe, config: Path) -> dict[str, Any]:
    """All settings of a recipe, as ``fit`` would print them.

    Raises:
        ValueError: for a setting that ``fit`` does not know, or a value of another type.
    """
    printed = io.StringIO()
    arguments = ["fit", "--config", str(config), *recipe.arguments(), "--print_config"]
    try:
        with contextlib.redirect_stdout(printed):
            lightning(PEagleCLI, arguments)
    except ArgumentError as error:
        reason = sentence(error)
        raise ValueError(f"recipe {recipe.name!r}: fit would refuse it: {reason}") from None
    except SystemExit:  # after printing
        pass
    return yaml.safe_load(printed.getvalue())


def steps_per_epoch(store: Store, settings: dict[str, Any]) -> int:
    """Optimizer steps in which a recipe sees all conversations once."""
    limit = settings["data"]["max_tokens"]
    lengths = [store.entries[i].tokens - 2 for i in store.split("train")]
    fitting = [length for length in lengths if 1 <= length <= limit]
    packs = fill_packs(list(range(len(fitting))), fitting, max_tokens=limit, seed=0)
    return len(packs) // settings["trainer"]["accumulate_grad_batches"]


def check_size(recipe: Recipe, epoch: int, *, steps: int, most_epochs: float) -> None:
    """Raise ``ValueError`` for a store that would be repeated too often to say anything."""
    if steps > most_epochs * epoch:
        raise ValueError(
            f"recipe {recipe.name!r}: the store has {epoch} steps of data, and {steps} steps would "
            f"repeat it more than {most_epochs:g} times: ask for fewer steps, capture more "
            "prompts, or raise --most_epochs"
        )
