"""What an engine loads itself: run by vLLM's interpreter, which has no peagle."""
