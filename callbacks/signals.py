"""SIGTERM and Ctrl-C: finish the step, leave a checkpoint, exit with 143 or 130.

Lightning answers SIGTERM with a broadcast from inside the signal handler. That hangs when one rank
alone is signalled, and the exit code is 0. Here a signal is only noted; after each batch the ranks
ask each other whether one was.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import lightning as L
import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_S = 10.0  # for the other processes of a run whose first has ended


class StopOnSignal(L.Callback):
    """End a run in order when it is told to; ``Checkpoint`` saves what is finished.

    A second signal ends it at once, even while the process waits in a collective: signals are
    read by a thread of their own. Outside of ``fit`` there is nothing to save, and the first one
    does.

    It also keeps Lightning's launcher from killing the first rank, which may be writing the
    checkpoint, as soon as another rank has ended.
    """

    def __init__(self) -> None:
        self.received = 0
        self.shared_batches = 0  # of the validation: how many every rank has
        self.trainer: L.Trainer | None = None
        self.writer: socket.socket | None = None
        self.previous: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer
        trainer._signal_connector.register_signal_handlers = leave_to_us
        if self.writer is None and threading.current_thread() is threading.main_thread():
            self.listen()

    def listen(self) -> None:
        reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.previous = {number: signal.signal(number, leave_to_us) for number in SIGNALS}
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()

    def watch(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(1):  # nothing once the other end is closed
                if numbers[0] in SIGNALS:
                    self.answer(numbers[0])

    def answer(self, number: int) -> None:
        if self.received or self.trainer.state.fn != "fit":
            for process in children_of(self.trainer):
                process.kill()
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        print(f"{name}: ending after this step; a second one ends at once", file=sys.stderr)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.stop_if_told(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            sanity = trainer.sanity_checking
            batches = trainer.num_sanity_val_batches if sanity else trainer.num_val_batches
            self.shared_batches = agreed(trainer, int(sum(batches)), "min")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and batch_idx < self.shared_batches:
            self.stop_if_told(trainer)

    def stop_if_told(self, trainer: L.Trainer) -> None:
        """Every rank must call this, and all then do the same."""
        number = agreed(trainer, self.received, "max")
        if number:
            raise SystemExit(128 + number)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        children = list(children_of(trainer))
        children_of(trainer).clear()  # Lightning's observer looks at this list
        atexit.register(end, children)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.writer is not None:
            signal.set_wakeup_fd(-1)
            for number, handler in self.previous.items():
                signal.signal(number, handler)
            self.writer.close()
            self.writer = None
        if self.received:  # after the last step: everything is saved
            raise SystemExit(128 + self.received)


def leave_to_us(*_: Any) -> None:
    """The thread of ``StopOnSignal`` hears of every signal; nothing else is to be done."""


def agreed(trainer: L.Trainer, value: int, how: str) -> int:
    """The largest or smallest value of all ranks."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op=how))


def children_of(trainer: L.Trainer) -> list[subprocess.Popen]:
    """The processes that Lightning started for the other ranks; none if something else did."""
    return getattr(trainer.strategy.launcher, "procs", [])


def end(processes: list[subprocess.Popen]) -> None:
    """Wait for processes that are ending, and end those that are not."""
    for process in processes:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
