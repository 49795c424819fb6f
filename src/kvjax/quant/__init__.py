"""Affine group quantiser and bit packing."""
