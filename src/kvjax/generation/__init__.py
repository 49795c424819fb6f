"""Text generation: prompts, prefill, the decode loop, sampling, states on disk."""
