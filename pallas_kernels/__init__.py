"""Kernels for packed caches: arrays in, arrays out, usable without kvjax, of which they import nothing.

None is here yet: every op runs as its XLA implementation in kvjax/ops.
"""
