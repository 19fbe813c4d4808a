"""The drafter in vLLM: a real engine in its own process and environment, asked over HTTP."""
