"""Texts, and how far a cache moves a model on them."""
