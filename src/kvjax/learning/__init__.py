"""Encoders that are trained: transforms of what a cache quantises, by their effect on the model's predictions."""
