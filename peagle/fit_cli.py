"""``fit``, ``validate`` and ``test``: LightningCLI over one YAML."""

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from peagle.arguments import (
    FOLDER,
    PATH,
)
from peagle.capture.capture import capture
from peagle.capture.config import CaptureConfig
from peagle.capture.identity import refuse_other_store
from peagle.decode.evaluation import EvaluationConfig
from peagle.kernels.device import pick_device
from peagle.kernels.threads import advise_threads
from peagle.model.checkpoint import check_address
from peagle.next_step import after_fit, bench_command, command
from peagle.preflight import (
    check_baseline,
    check_epochs,
    check_trainer,
    checks_without_weights,
    refuse_barebones,
    refuse_other_run,
    require_gpu,
    require_logged,
    require_training,
    require_writable_run,
)
from peagle.serve.export import export_drafter, remove_export
from peagle.store.hub import store_address
from peagle.store.locks import locked
from peagle.store.reader import Store
from peagle.target.target import TargetSource
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
        check_trainer(trainer)
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
