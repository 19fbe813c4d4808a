"""The command line: LightningCLI for fit, validate and test; plain functions for the rest."""

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from lightning.fabric.utilities.enums import LightningEnum
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from peagle.arguments import (
    FOLDER,
    PATH,
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
from peagle.capture.config import CaptureConfig
from peagle.capture.identity import refuse_other_store, wanted_manifest
from peagle.card.target_name import hub_name_of
from peagle.decode.evaluation import EvaluationConfig
from peagle.kernels.device import pick_device
from peagle.kernels.threads import advise_threads
from peagle.model.checkpoint import check_address
from peagle.model.restore import refuse_other_target
from peagle.model.saved_drafter import load_drafter
from peagle.next_step import after_fit, bench_command, command
from peagle.plan.report import RunShape, plan
from peagle.preflight import (
    check_baseline,
    check_decodable,
    check_drafter,
    check_epochs,
    refuse_barebones,
    refuse_foreign_files,
    refuse_other_run,
    refuse_strategy,
    refuse_swa,
    require_batches,
    require_clipping,
    require_gpu,
    require_logged,
    require_logger,
    require_training,
    require_writable_run,
)
from peagle.quiet import silence_libraries
from peagle.serve.contract import Layout
from peagle.serve.export import Verifier, export_drafter, refuse_foreign, remove_export
from peagle.shipped_configs import with_files
from peagle.store.hub import find_store, store_address
from peagle.store.locks import locked
from peagle.store.reader import Store
from peagle.target.target import TargetSource
from peagle.train.datamodule import HiddenStatesDataModule
from peagle.train.module import PEagleModule
from peagle.train.packed_sequences import refuse_mask_tokens


class PEagleCLI(LightningCLI):
    """``fit``, ``validate`` and ``test`` over one YAML that names the target once."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        hidden = {"model", "datamodule", "weights_only"}  # checkpoints are data, always
        return {
            "fit": {*hidden, "train_dataloaders", "val_dataloaders"},
            "validate": {*hidden, "dataloaders"},
            "test": {*hidden, "dataloaders"},
        }

    def init_parser(self, **settings: Any) -> LightningArgumentParser:
        """One that raises for a bad argument; ``python -m peagle`` makes a sentence of it."""
        return super().init_parser(exit_on_error=False, **settings)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--target", type=PATH, required=True, help="'tiny', a folder, or a Hub id"
        )
        parser.add_argument("--revision", type=str | None, default=None, help="of a Hub id")
        parser.add_argument(
            "--run_dir", type=FOLDER, required=True, help="everything a run writes goes here"
        )
        parser.add_argument(
            "--store",
            type=FOLDER,
            required=True,
            help="hidden states, shared by runs: a folder, or hf://datasets/OWNER/NAME@REVISION",
        )
        parser.add_class_arguments(CaptureConfig, "capture")
        parser.add_class_arguments(EvaluationConfig, "evaluation")
        for source, goal in (
            ("target", "data.target"),
            ("revision", "data.revision"),
            ("store", "data.store"),
            ("run_dir", "trainer.default_root_dir"),
            ("run_dir", "trainer.logger.init_args.run_dir"),  # of each logger that has it
            ("run_dir", "trainer.logger.init_args.save_dir"),
            ("model.cod.num_depths", "data.cod.num_depths"),
            ("model.cod.keep_ratio", "data.cod.keep_ratio"),
            ("model.cod.min_keep_ratio", "data.cod.min_keep_ratio"),
            ("model.mask_token_id", "data.mask_token_id"),
        ):
            parser.link_arguments(source, goal)
        parser.link_arguments("evaluation", "data.evaluation", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyper-parameters override the command line."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Checkpoints are read as data."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        path = self.checkpoint(subcommand)
        if subcommand == "fit" and path is None and arguments.get("ckpt_path"):
            print("no last.ckpt yet: starting from the beginning", file=sys.stderr)
        return {**arguments, "ckpt_path": path, "weights_only": True}

    def checkpoint(self, subcommand: str) -> str | None:
        """Where to start from; ``last`` means this run's.

        A job that is started again and again with one command needs ``fit --ckpt_path last`` to
        begin when there is nothing to go on from.

        Raises:
            ValueError: if the checkpoint does not exist, or none is given where one is needed.
        """
        path = self.config[subcommand].ckpt_path
        if path == "last":
            path = str(Path(self.config[subcommand].run_dir) / "checkpoints" / "last.ckpt")
            if subcommand == "fit" and not Path(path).exists():
                path = None
        if path is not None:
            check_address(path)
        elif subcommand != "fit":
            raise ValueError(
                f"{subcommand} needs --ckpt_path: a file, hf://OWNER/NAME/FILE@REVISION, or last"
            )
        return path

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        """Raises ``ValueError`` for a missing GPU, and for settings that exclude each other."""
        given = self.config[self.subcommand].trainer
        require_gpu(given.accelerator)
        refuse_barebones(given.barebones)
        try:
            trainer = super().instantiate_trainer(**settings)
        except (MisconfigurationException, TypeError) as error:
            # Lightning raises TypeError for numbers of devices.
            remedy = "; leave one of the two out" if "callbacks list" in str(error) else ""
            raise ValueError(f"trainer: {str(error).rstrip('.')}{remedy}") from error
        refuse_strategy(trainer)
        refuse_swa(trainer)
        require_batches(trainer)
        require_clipping(trainer)
        require_logger(trainer)
        if not trainer.fast_dev_run:
            require_writable_run(Path(self.config[self.subcommand].run_dir))
        return trainer

    def instantiate_classes(self) -> None:
        """A checkpoint takes the place of what a run once started from: it is not read again."""
        super().instantiate_classes()
        if self.checkpoint(self.subcommand) is not None:
            self.model.init_from = None

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as self.held:
            super()._run_subcommand(subcommand)

    def hold(self, run_dir: Path) -> None:
        """Keep the run's folder for this fit until it ends, however it ends.

        Raises:
            ValueError: while another fit writes into it.
        """
        if self.trainer.fast_dev_run or rank_zero_only.rank != 0:
            return
        try:
            self.held.enter_context(locked(run_dir / ".fit.lock", wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"another fit is writing into {run_dir}: wait for it, or give another --run_dir"
            ) from error

    def before_fit(self) -> None:
        config = self.config_init.fit
        target = TargetSource(config.target, config.revision)
        self.check_fit(config, target)
        self.say_threads()
        self.require_store(config, target)
        self.hold(Path(config.run_dir))

    def require_store(self, config: Any, target: TargetSource) -> None:
        """Make the store if it is missing; other ranks wait for the first.

        One on the Hub is never made, but must be the one for this run.
        """
        store = Path(config.store)
        if store_address(config.store) is not None:
            if rank_zero_only.rank == 0:
                found = self.datamodule.on_hub()
                refuse_other_store(target, config.capture, found.folder, str(found))
            return
        if rank_zero_only.rank == 0:
            # Sampling answers must not move the seed that a drafter's weights are drawn from.
            with torch.random.fork_rng():
                mask = self.datamodule.mask_token_id
                capture(target, config.capture, store, mask_token_id=mask, to_train=True)
            refuse_mask_tokens(Store(store, allow_missing=True), mask)
        while not (store / "manifest.json").exists():
            time.sleep(1)

    def say_threads(self) -> None:
        """Say at once if threads will wait for cores; Lightning shares cores among processes."""
        alone = self.trainer.world_size == 1
        if alone and (line := advise_threads(self.trainer.strategy.root_device)):
            print(line, file=sys.stderr)

    def check_fit(self, config: Any, target: TargetSource) -> None:
        """Raise ``ValueError`` now for what would end the run after hours."""
        checkpoint, run_dir = self.checkpoint("fit"), Path(config.run_dir)
        if config.capture.part is not None:
            raise ValueError(
                "capture.part is for `peagle capture`: leave it out here, and what the parts have "
                "not captured yet is captured now"
            )
        if checkpoint is None:
            require_training(self.trainer)
        require_logged(self.trainer, self.model.cod.num_depths)
        if not self.trainer.fast_dev_run:
            refuse_other_run(run_dir, target)
        for device in (config.capture.device, config.evaluation.device):
            pick_device(device)  # raises for one that is not there
        for check in checks_without_weights(config, target):
            check()
        if not (Path(config.store) / "manifest.json").exists():  # else Lightning says so at once
            check_epochs(checkpoint, self.trainer.max_epochs)

    def after_fit(self) -> None:
        """Prove what was trained: the servable folder, both tables, the card."""
        trainer, run_dir = self.trainer, Path(self.config.fit.run_dir)
        if trainer.global_step == 0:
            raise ValueError("not one step was trained, hence nothing is exported: raise max_time")
        if trainer.fast_dev_run:  # everything is tried, and nothing is kept
            with tempfile.TemporaryDirectory() as folder:
                self.export(Path(folder) / "drafter")
        elif trainer.is_global_zero:
            self.export(run_dir / "drafter")
        trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            print(after_fit(run_dir, self.config.fit.target, self.config.fit.revision))

    def before_test(self) -> None:
        config = self.config_init.test
        check_baseline(config.evaluation.baseline, TargetSource(config.target, config.revision))

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            print(f"\nnext:\n{command('test', *sys.argv[2:])}")

    def after_test(self) -> None:
        config = self.config.test
        drafter = Path(config.run_dir) / "drafter"
        if self.trainer.is_global_zero and drafter.exists():
            print(f"\nnext:\n{bench_command(drafter, config.target, config.revision)}")

    def export(self, folder: Path) -> None:
        if self.model.drafter.config.hidden_state == "shared":
            export_drafter(self.model.drafter, folder)
            return
        remove_export(folder)  # an earlier run's is not what was just trained
        print("no drafter/ is written: this hidden_state is for comparison, not for serving")


def checks_without_weights(config: Any, target: TargetSource) -> list[Callable[[], Any]]:
    """Each raises ``ValueError`` for what would end a fit."""
    run_dir = Path(config.run_dir)
    checks: list[Callable[[], Any]] = [
        partial(refuse_foreign_files, run_dir),
        partial(check_drafter, config.model, target, config.capture, run_dir),
    ]
    if config.trainer.limit_test_batches != 0:
        checks += [
            partial(check_decodable, target),
            partial(check_baseline, config.evaluation.baseline, target),
            config.data.test_batches,  # raises for prompts
        ]
    return checks


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


def run_shape(config: Any, optimizer: str) -> RunShape:
    """What the trainer's, the model's and the data's settings mean for costs."""
    model, data, trainer = config.model, config.data, config.trainer
    device = "cpu" if trainer.accelerator == "cpu" else pick_device("auto")
    return RunShape(
        drafter_config=model.drafter_config,
        cod=model.cod,
        max_tokens=data.max_tokens,
        max_rows=data.max_rows,
        memory_gb=data.memory_gb,
        recompute=model.recompute,
        devices=trainer.devices if isinstance(trainer.devices, int) else 1,
        accumulate=trainer.accumulate_grad_batches,
        epochs=trainer.max_epochs or 1000,  # Lightning's own default
        max_steps=trainer.max_steps,
        half="16" in str(trainer.precision),
        muon="Muon" in optimizer,
        train_embeddings=model.train_embeddings,
        device=device,
    )


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


def export(
    ckpt_path: str,
    out: Path,
    format: Layout = "eagle3",
    target: str | None = None,
    revision: str | None = None,
    k: int | None = None,
) -> None:
    """Write the servable folder of a checkpoint.

    Args:
        ckpt_path: a ``.ckpt`` of ``fit``, or hf://OWNER/NAME/FILE@REVISION.
        out: folder to write; an earlier export is replaced, any other content is refused.
        format: ``eagle3`` for vLLM's --speculative-config, ``speculators`` for ``vllm serve DIR``.
        target: Hub id (or folder) of the target; the speculators format names it.
        revision: of the Hub id.
        k: drafts per round that the speculators format asks for; default the trained depth.
    """
    refuse_foreign(Path(out))  # before a checkpoint is fetched
    verifier, drafter = None, load_drafter(ckpt_path)
    if target is not None:
        source = TargetSource(target, revision)
        text = source.config()
        refuse_other_target(drafter.config, text)
        verifier = Verifier(verifier_name(source, format), text.architectures or [])
    export_drafter(drafter, Path(out), layout=format, verifier=verifier, k=k)
    print(f"wrote {out}; next:\n{bench_command(out, target or 'TARGET', revision)}")


def verifier_name(source: TargetSource, format: Layout) -> str:
    """Hub id of the target, as a card finds it; its folder where nothing tells it."""
    folder = Path(source.path)
    if not folder.is_dir():
        return source.name
    found = hub_name_of(folder)
    name = found.hub_id if found else str(folder.resolve())
    how = f"{name}, after {found.source}" if found else f"its folder on this machine, {name}"
    if format == "speculators":
        print(f"config.json names the target by {how}: give --target HUB_ID if it has another",
              file=sys.stderr)  # fmt: skip
    return name


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
