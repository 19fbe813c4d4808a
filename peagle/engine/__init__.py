"""vLLM as a server: found, started, asked over HTTP, and gone afterwards."""
