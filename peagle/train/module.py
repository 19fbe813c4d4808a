"""The LightningModule: batch -> rows -> segments -> loss, and what is measured on the way."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning as L
import torch
from jaxtyping import Int
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peagle.cod.sampling import Cod, Rows, sample_rows
from peagle.decode.decoder import Decoder
from peagle.decode.decoders import make_decoders
from peagle.decode.evaluation import PromptBatch, Run, decode_batch
from peagle.kernels.choose import Kernels
from peagle.model.build import build_drafter
from peagle.model.config import HIDDEN_STATES, PEagleConfig
from peagle.model.drafter import Drafter
from peagle.model.restore import (
    refuse_differences,
    refuse_other_kind,
    refuse_other_tensors,
    refuse_unknown_fields,
    saved_config,
)
from peagle.store.hub import reraise_with_address
from peagle.store.manifest import Manifest
from peagle.target.head import TargetHead
from peagle.train.loss import check_mix
from peagle.train.metrics import DepthAccuracy, accuracy_by_depth
from peagle.train.new_drafter import new_drafter
from peagle.train.objective import objective
from peagle.train.optimizer import parameter_groups
from peagle.train.optimizer_options import impose, impose_schedule, options_of, schedule_options_of
from peagle.train.packing import Batch
from peagle.train.schedule import LinearSchedule
from peagle.train.skip_nonfinite import SkipNonfinite, nan_unless_finite
from peagle.train.step_mean import StepMean, rescale


class PEagleModule(L.LightningModule):
    """Trains one drafter.

    Args:
        mask_token_id: a token id that never occurs in text; every guess beyond the first reads it.
            Only a p-eagle drafter has one.
        cod: depths and their thinning. EAGLE-3 was published without thinning: ``keep_ratio`` 1.
        drafter: ``p-eagle`` guesses all tokens in one pass; ``eagle3`` is the baseline, which needs
            a pass for each token.
        num_layers: drafter layers. Four is the paper's choice; more layers guess better and
            cost latency.
        hidden_size: width of the drafter; default the target's.
        intermediate_size: of the feed-forward; default the target's.
        num_key_value_heads: default the target's. With as many as the hidden state is wide
            (``hidden_size / head_dim``) the layers start as copies of the target's.
        draft_vocab_size: tokens that the drafter can guess; default all. Fewer are faster; the
            most frequent tokens of the answers are kept.
        norm_before_residual: layer 0 adds to the normed hidden state instead of the raw one.
        norm_before_fc: one norm over all captured layers before ``fc``.
        fc_norm: one norm per captured layer before ``fc``.
        hidden_state: of rows beyond the first guess. ``shared``, one learned vector, is the
            paper's choice and what vLLM serves; the others (``peagle/model/mtp_hidden.py``) are
            for comparison and cannot be exported.
        start: ``target`` lets layers start as copies of the target's where they fit; ``random``
            never. Embedding, norm and head start as the target's either way.
        init_from: a drafter to go on from, for a fine-tuned target or data of one's own: a folder
            that ``export`` wrote, or OWNER/NAME or OWNER/NAME@REVISION of the Hub. Its weights take
            the place of what ``start`` gives. It must have this run's shape and mask token. A run
            that goes on from a checkpoint does not read it.
        train_embeddings: the paper found training them better than freezing them.
        recompute: run NTP again in the backward pass: less memory for long sequences, more time.
        kernels: ``auto`` computes as the device is fastest; ``reference`` by plain PyTorch, on any
            device, which takes more time and memory.
        loss: weights of the losses to add up: kl, ce, tv, lk_hybrid.
        depth_decay: a row of depth d weighs ``depth_decay ** d``. EAGLE-3 was published with 0.8.
        optimizer: called with the parameters.
        lr_scheduler: called with the optimizer and the number of steps.
    """

    def __init__(
        self,
        mask_token_id: int | None = None,
        cod: Cod = Cod(),  # noqa: B008 (frozen)
        drafter: Literal["p-eagle", "eagle3"] = "p-eagle",
        num_layers: int = 4,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        num_key_value_heads: int | None = None,
        draft_vocab_size: int | None = None,
        norm_before_residual: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        hidden_state: Literal[HIDDEN_STATES] = "shared",
        start: Literal["target", "random"] = "target",
        init_from: str | None = None,
        train_embeddings: bool = True,
        recompute: bool = False,
        kernels: Kernels = "auto",
        loss: dict[str, float] | None = None,
        depth_decay: float = 1.0,
        optimizer: Callable[[Iterable], Optimizer] = lambda p: AdamW(p, lr=1e-4, weight_decay=0.0),
        lr_scheduler: Callable[[Optimizer, int], LRScheduler] = LinearSchedule,
    ):
        super().__init__()
        if drafter == "p-eagle" and mask_token_id is None:
            raise ValueError(
                "a p-eagle drafter needs mask_token_id: give a token id that never occurs in text"
            )
        if drafter == "eagle3" and hidden_state != "shared":
            raise ValueError("hidden_state is for p-eagle drafters: an eagle3 drafter has its own")
        if not 0 < depth_decay <= 1:
            raise ValueError(f"depth_decay must lie in (0, 1], got {depth_decay}")
        self.cod, self.draft_vocab_size, self.kernels = cod, draft_vocab_size, kernels
        self.start, self.train_embeddings, self.recompute = start, train_embeddings, recompute
        self.mix, self.depth_decay = check_mix({"kl": 1.0} if loss is None else loss), depth_decay
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.init_from = init_from
        self.started_from: dict[str, str] | None = None
        self.architecture: dict[str, Any] = {
            "parallel_drafting": drafter == "p-eagle",
            "mask_token_id": mask_token_id,
            "num_depths": cod.num_depths,
            "num_hidden_layers": num_layers,
            "norm_before_residual": norm_before_residual,
            "norm_before_fc": norm_before_fc,
            "fc_norm": fc_norm,
            "hidden_state": hidden_state,
        }
        widths = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_key_value_heads": num_key_value_heads,
        }
        self.architecture |= {key: value for key, value in widths.items() if value is not None}
        self.drafter: Drafter | None = None
        self.target_head: TargetHead | None = None
        self.full_head: list[TargetHead] = []
        self.decoders: dict[str, Decoder] = {}
        self.depths = DepthAccuracy(cod.num_depths)
        self.step_mean, self.skip_nonfinite = StepMean(), SkipNonfinite()
        self.rows_trained = self.tokens_trained = 0
        self.classes: dict[str, str] = {}  # of optimizer and schedule
        self.saved_classes: dict[str, str] = {}

    def configure_model(self) -> None:
        """Build the drafter for the store's target; weights start from the target's own."""
        data = self.trainer.datamodule
        if data.store is None:
            return
        if self.drafter is None:
            # Lightning makes the GPU the default here, and moves the module there afterwards. What
            # a store holds is read on the CPU, and random weights are the same on every device.
            with torch.device("cpu"), reraise_with_address(data.address):
                self.build()
        data.limit_rows(self.drafter.config, recompute=self.recompute)

    def build(self) -> None:
        data = self.trainer.datamodule
        manifest = data.store.manifest
        new = new_drafter(
            self.drafter_config(manifest),
            data.folder,
            manifest,
            token_counts=data.assistant_tokens,
            copy_layers=self.start == "target",
            init_from=self.init_from,
        )
        self.drafter, self.started_from = new.drafter, new.started_from
        self.drafter.kernels = self.kernels
        self.full_head = [new.head]  # in a list: Lightning must neither move nor save it
        self.use_vocabulary(new.kept)
        for note in new.notes:
            self.print(note)
        self.freeze_embeddings()

    def freeze_embeddings(self) -> None:
        """Raises ``ValueError`` where they start from random values."""
        config = self.drafter.config
        if not self.train_embeddings and config.hidden_size != config.target_hidden_size:
            raise ValueError(
                f"train_embeddings: false needs the target's own embeddings, and a drafter of "
                f"width {config.hidden_size} cannot take those of width "
                f"{config.target_hidden_size}: leave out hidden_size, or train them"
            )
        self.drafter.embed_tokens.requires_grad_(self.train_embeddings)

    def use_vocabulary(self, kept: Int[Tensor, " W"]) -> None:
        """Compare with the target over these tokens only."""
        self.target_head = self.full_head[0].restricted(kept).to(self.device)

    def drafter_config(self, manifest: Manifest) -> PEagleConfig:
        """The target's block shape, with what this run changes."""
        refuse_unknown_fields(manifest.block, "the store's manifest")
        return PEagleConfig(
            **{**manifest.block, **self.architecture},
            vocab_size=manifest.vocab_size,
            draft_vocab_size=self.draft_vocab_size,
            target_hidden_size=manifest.hidden_size,
            eagle_aux_hidden_state_layer_ids=manifest.layer_ids,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch.seed)
        rows = sample_rows(batch.supervised, batch.document, cod=self.cod, generator=generator)
        outcome = objective(
            self.drafter,
            self.target_head,
            batch,
            rows,
            mix=self.mix,
            depth_decay=self.depth_decay,
            recompute=self.recompute,
        )
        self.rows_trained += len(rows.anchor)
        self.tokens_trained += len(batch.tokens)
        for depth, accuracy in accuracy_by_depth(outcome.rows, outcome.correct).items():
            self.log(f"train/accuracy_d{depth}", accuracy, batch_size=1)
        return nan_unless_finite(self.step_mean.add(outcome))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradients those of the mean over all rows of the step, and log it."""
        step, batches = self.step_mean.finish(), self.trainer.accumulate_grad_batches
        if batches > 1:  # Lightning has divided the loss of each batch by their number
            rescale(self.drafter.parameters(), batches * step.factor)
        self.log("train/loss", step.loss, prog_bar=True, batch_size=1)
        self.log("train/accuracy", step.accuracy, batch_size=1)
        if self.skip_nonfinite.skipped:
            self.log("train/skipped_steps", float(self.skip_nonfinite.skipped), batch_size=1)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip. Where ``skip_nonfinite`` has dropped the gradients, the step changes nothing."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self.skip_nonfinite.norm(parameters)
        if self.skip_nonfinite.in_a_row:
            self.print(
                f"step {self.global_step}: loss or gradients are not finite, the step is skipped "
                f"({self.skip_nonfinite.in_a_row} in a row, {self.skip_nonfinite.skipped} in all)"
            )
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.skip_nonfinite.stop_if_hopeless()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        rows = self.every_row(batch)
        outcome = objective(self.drafter, self.target_head, batch, rows, mix=self.mix)
        self.depths.update(outcome.rows.to(self.device), outcome.correct)
        count = len(rows.anchor)
        mean = outcome.loss / max(count, 1)  # nothing supervised: it weighs nothing in the mean
        self.log("val/loss", mean, batch_size=count, sync_dist=True, logger=self.fitting)

    @property
    def fitting(self) -> bool:
        """Whether figures belong to the training curve; ``validate`` leaves it alone."""
        return self.trainer.state.fn == "fit"

    def every_row(self, batch: Batch) -> Rows:
        """All rows of all supervised anchors: nothing is drawn, nothing dropped."""
        return sample_rows(
            batch.supervised, batch.document, cod=self.cod.keeping_all(), generator=None
        )

    def on_validation_epoch_end(self) -> None:
        report = self.depths.compute()
        for depth, accuracy in enumerate(report.accuracy):
            self.log(f"val/accuracy_d{depth}", accuracy, logger=self.fitting, sync_dist=True)
        length = report.acceptance_length
        self.log(
            "val/acceptance_length", length, prog_bar=True, logger=self.fitting, sync_dist=True
        )

    def on_validation_epoch_start(self) -> None:
        self.depths.reset()

    def on_test_start(self) -> None:
        """Load the target, and the drafters as they are served: bf16 weights."""
        data = self.trainer.datamodule
        if self.drafter is None:
            raise ValueError("test needs --ckpt_path: there is no drafter to test")
        self.decoders, self.tokenizer = make_decoders(
            self.drafter, data.target, data.evaluation, self.kernels
        )

    def test_step(self, batch: PromptBatch, batch_idx: int) -> list[Run]:
        config = self.trainer.datamodule.evaluation
        return decode_batch(self.decoders, batch, config, self.tokenizer)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(parameter_groups(self.drafter))
        self.configured = options_of(optimizer)
        scheduler = self.lr_scheduler(optimizer, self.total_steps())
        self.configured_schedule = schedule_options_of(scheduler)
        self.classes = {
            "optimizer": type(optimizer).__name__,
            "lr_scheduler": type(scheduler).__name__,
        }
        refuse_differences(self.saved_classes, self.classes, "is of a run with another optimizer")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def total_steps(self) -> int:
        """Raises ``ValueError`` for a run without an end: its learning rate could never fall."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("training needs an end: set trainer.max_epochs or trainer.max_steps")
        return int(steps)

    def on_train_start(self) -> None:
        """The configuration decides the learning rate, also of a resumed run."""
        if self.trainer.precision == "16-mixed":
            raise ValueError("precision 16-mixed is not supported: use bf16-mixed or 32-true")
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        self.step_mean = StepMean()  # an earlier fit may have ended inside a step
        impose(self.configured, self.trainer.optimizers[0], scheduler)
        impose_schedule(self.configured_schedule, scheduler)

    def progress(self) -> dict[str, int]:
        """What was counted since the run began."""
        return {
            "rows": self.rows_trained,
            "tokens": self.tokens_trained,
            "skipped": self.skip_nonfinite.skipped,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["drafter_config"] = self.drafter.config.to_dict()
        checkpoint["progress"] = self.progress()
        checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ``ValueError`` with the difference when the checkpoint is another drafter's."""
        saved = saved_config(checkpoint)
        averaging = any(isinstance(c, WeightAveraging) for c in self.trainer.callbacks)
        if self.fitting and "averaging_state" in checkpoint and not averaging:
            self.print(
                "the checkpoint holds averaged weights, and this run averages none: it goes on "
                "from the average; add peagle.callbacks.average.AveragedWeights to average further"
            )
        if self.drafter is None:  # test needs no store
            self.drafter = build_drafter(saved)
            self.drafter.kernels = self.kernels
        refuse_other_kind(saved, self.drafter.config)
        ours = self.drafter.config.to_dict()
        refuse_differences(saved.to_dict(), ours, "has another architecture")
        refuse_other_tensors(checkpoint["state_dict"], self.state_dict())
        if saved.pruned and self.target_head is not None:
            offsets = checkpoint["state_dict"]["drafter.d2t"]
            self.use_vocabulary(torch.arange(len(offsets)) + offsets)
        progress, loop = checkpoint["progress"], checkpoint["loops"]["fit_loop"]
        self.rows_trained, self.tokens_trained = progress["rows"], progress["tokens"]
        self.skip_nonfinite.skipped = progress["skipped"]
        self.saved_classes = checkpoint.get("classes", {})
        self.trainer.datamodule.resumed = loop["epoch_loop.batch_progress"]["total"]["processed"]
