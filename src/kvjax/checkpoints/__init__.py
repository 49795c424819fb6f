"""Reading of checkpoints (safetensors, GGUF, Orbax) and writing of Orbax checkpoints."""
