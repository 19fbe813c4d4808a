"""The command line: ``capture`` and ``plan`` over the YAML of a fit, and what runs each command."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli
from lightning.fabric.utilities.enums import LightningEnum
from lightning.pytorch.cli import LightningArgumentParser

from peagle.arguments import (
    expand_home,
    refuse_old_names,
    refuse_repeated_keys,
    refuse_save_dir,
    refuse_tokens,
    replacing_lists,
    underscored,
)
from peagle.callbacks.record import RunConfig
from peagle.capture.capture import capture
from peagle.capture.identity import wanted_manifest
from peagle.fit_cli import PEagleCLI
from peagle.next_step import command
from peagle.plan.report import plan
from peagle.plan.run_shape import run_shape
from peagle.preflight import checks_without_weights
from peagle.quiet import silence_libraries
from peagle.serve.export_command import export
from peagle.shipped_configs import with_files
from peagle.store.hub import find_store, store_address
from peagle.target.target import TargetSource
from peagle.train.datamodule import HiddenStatesDataModule
from peagle.train.module import PEagleModule


class CaptureCLI(PEagleCLI):
    """Reads the same YAML as ``fit`` and only makes the store."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.parser.instantiate_classes(self.config)[subcommand]
        if store_address(config.store) is not None:
            raise ValueError(
                "a store is captured into a folder: give --store FOLDER, and put it on the Hub "
                "with `hf upload`"
            )
        target = TargetSource(config.target, config.revision)
        drafter = config.model.drafter_config(wanted_manifest(target, config.capture))
        mask = drafter.mask_token_id
        capture(target, config.capture, Path(config.store), mask_token_id=mask)
        if config.capture.part is None:
            print(
                f"the store in {config.store} is complete; next:\n{command('fit', *sys.argv[2:])}"
            )


class PlanCLI(PEagleCLI):
    """Reads the same YAML as ``fit`` and only says what it would cost."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--answers", type=int, default=128, help="plan: prompts answered to measure lengths"
        )
        parser.add_argument(
            "--seconds", type=float, default=2.0, help="plan: how long speed is measured"
        )

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        config = self.parser.instantiate_classes(self.config)[subcommand]
        written, address = self.config[subcommand], store_address(config.store)
        target = TargetSource(config.target, config.revision)
        text = plan(
            target,
            config.capture,
            config.evaluation,
            run_shape(config, str(written.model.optimizer)),
            Path(config.store) if address is None else find_store(address),
            answers=config.answers,
            seconds=config.seconds,
        )
        print(text)
        for check in checks_without_weights(config, target):
            try:
                check()
            except (ValueError, OSError) as error:  # the Hub's among them
                print(f"warning    fit will refuse: {error}")


def lightning(cli: type[PEagleCLI], arguments: list[str]) -> None:
    # sys.argv stays as it was typed: Lightning's launcher repeats it for further processes.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    # Between Lightning 2.6 and torch 2.13; nothing that a user could do about it.
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec", FutureWarning)
    # Timer's default for its `interval` is one, which YAML does not know.
    yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, x: dumper.represent_str(x))
    cli(
        PEagleModule,
        HiddenStatesDataModule,
        args=arguments,
        save_config_callback=RunConfig,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        # The data module shares its packs among the ranks; Lightning would share them once more.
        # Lightning's summary of the model counts no FLOPs here and warns of precisions; Progress
        # says what is trained.
        trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False},
    )


READERS: dict[str, type[PEagleCLI]] = {"capture": CaptureCLI, "plan": PlanCLI}
FUNCTIONS: dict[str, Callable[..., Any]] = {"export": export}
OPTIONS = {"as_positional": False, "exit_on_error": False}  # of jsonargparse


def run(name: str, arguments: list[str]) -> None:
    """Run one command of ``python -m peagle``; raises ``ValueError`` for what the user can mend."""
    silence_libraries()
    arguments = with_files(expand_home(arguments))
    refuse_tokens(arguments)
    refuse_old_names(arguments)
    refuse_repeated_keys(arguments)
    refuse_save_dir(arguments)
    arguments = replacing_lists(arguments)
    if name in FUNCTIONS:
        auto_cli(FUNCTIONS[name], args=arguments[1:], **OPTIONS)
    elif name == "bench":
        from peagle.bench.run import BenchConfig, bench  # it draws, and matplotlib is slow to load

        bench(auto_cli(BenchConfig, args=underscored(arguments[1:]), **OPTIONS))
    elif name == "publish":
        from peagle.publish.publish import publish

        auto_cli(publish, args=arguments[1:], **OPTIONS)
    elif name in READERS:
        lightning(READERS[name], ["fit", *arguments[1:]])
    else:
        lightning(PEagleCLI, arguments)
