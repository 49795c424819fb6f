"""Decoder models: configs, parameters, tokenizers and named sources of weights."""
