"""vLLM's worker for a CPU, which drafts nothing while hidden states are handed out.

vLLM hands them out by a method of speculative decoding whose only draft, the last token again, is
nearly always wrong. A GPU checks it for nothing; a CPU would compute every token twice. Besides,
vLLM 0.32 on a CPU leaves the temperatures of requests with drafts unwritten
(vllm-project/vllm#42638), and draws anything.
"""

from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.cpu_worker import CPUWorker


class PeagleCpuWorker(CPUWorker):
    def take_draft_token_ids(self) -> DraftTokenIds | None:
        return None
