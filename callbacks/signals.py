"""What a run does on a signal (``ON_SIGNAL``): it finishes the step, saves, exits with 143 or 130.

Lightning answers SIGTERM with a broadcast from inside the signal handler. That hangs when one rank
alone is signalled, and the exit code is 0. Here a signal is only noted; after each batch the ranks
ask each other whether one was received.
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


def stop(number: int) -> None:
    """End the run: on this exception ``Checkpoint`` saves the finished step."""
    raise SystemExit(128 + number)


# What every rank does after its batch once any of them has received the signal.
ON_SIGNAL = {signal.SIGINT: stop, signal.SIGTERM: stop}
GRACE_S = 10.0  # for the other processes of a run whose first has ended


class StopOnSignal(L.Callback):
    """End a run in order when it is told to; ``Checkpoint`` saves what is finished.

    A second signal ends it at once, even while the process waits in a collective: signals are
    read by a thread of their own. Outside ``fit`` the first signal exits at once: there is nothing
    to save.

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
        trainer._signal_connector.register_signal_handlers = ignore
        if self.writer is None and threading.current_thread() is threading.main_thread():
            self.listen()

    def listen(self) -> None:
        reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.previous = {number: signal.signal(number, ignore) for number in ON_SIGNAL}
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()

    def watch(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(1):  # nothing once the other end is closed
                if numbers[0] in ON_SIGNAL:
                    self.receive(numbers[0])

    def receive(self, number: int) -> None:
        """Note a first signal of ``fit``; exit at once on any other."""
        if self.received or self.trainer.state.fn != "fit":
            for process in children_of(self.trainer):
                process.kill()
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        print(f"{name}: ending after this step; a second one ends at once", file=sys.stderr)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.act_on_signal(trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":
            sanity = trainer.sanity_checking
            batches = trainer.num_sanity_val_batches if sanity else trainer.num_val_batches
            self.shared_batches = over_ranks(trainer, int(sum(batches)), "min")

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn == "fit" and batch_idx < self.shared_batches:
            self.act_on_signal(trainer)

    def act_on_signal(self, trainer: L.Trainer) -> None:
        """Every rank must call this, and all then do the same."""
        number = over_ranks(trainer, self.received, "max")
        if number:
            ON_SIGNAL[number](number)

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        children = list(children_of(trainer))
        children_of(trainer).clear()  # Lightning's observer looks at this list
        atexit.register(wait_or_kill, children)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.writer is not None:
            signal.set_wakeup_fd(-1)
            for number, handler in self.previous.items():
                signal.signal(number, handler)
            self.writer.close()
            self.writer = None
        if self.received:  # after the last step: everything is saved
            stop(self.received)


def ignore(*_: Any) -> None:
    """As a signal's handler: the thread of ``StopOnSignal`` receives every signal."""


def over_ranks(trainer: L.Trainer, value: int, how: str) -> int:
    """The largest or smallest value of all ranks."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op=how))


def children_of(trainer: L.Trainer) -> list[subprocess.Popen]:
    """The processes that Lightning started for the other ranks; none if something else did."""
    return getattr(trainer.strategy.launcher, "procs", [])


def wait_or_kill(processes: list[subprocess.Popen]) -> None:
    """Wait for processes that are ending, and kill those that are not."""
    for process in processes:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
