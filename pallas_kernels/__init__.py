"""Kernels for packed caches: arrays in, arrays out, usable without kvjax, of which they import nothing.

One folder per op, its `reference.py` beside the kernels. docs/kernels.md says what runs where.
"""
