"""vLLM's connector that writes hidden states, for engines without a GPU.

vLLM's own copies states on a CUDA stream while the next step runs. On a CPU the states are copied
at once; only the file is written beside. This file imports vLLM and torch alone.
"""

from functools import partial

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class Copied:
    """Stands in for the event of a copy that is done."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class PeagleCpuConnector(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: PendingSave) -> None:
        """Copy a finished request's states out of the cache, and have the file written.

        The lock was taken when the request came, and is given back when the file is whole.
        """
        name, tokens = pending.req_id, pending.token_ids
        places = torch.tensor(pending.block_ids)[:, None] * self._block_size
        slots = (places + torch.arange(self._block_size)).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(tokens)).contiguous()
        tensors = {"hidden_states": states, "token_ids": tokens.clone()}
        lock = self._lock_fds.pop(name, None)
        future = self._executor.submit(
            self._write_tensors, tensors, Copied(), pending.filename, lock
        )
        self._req_copy_events[name] = Copied()
        self._req_futures[name] = future
        future.add_done_callback(partial(self._on_write_done, name))
