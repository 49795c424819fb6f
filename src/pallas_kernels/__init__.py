"""Kernels for packed caches: arrays in, arrays out. They import nothing from kvjax and work without it.

There is one folder per op, with a `reference.py` beside the kernels. docs/kernels.md says what runs where.
"""
