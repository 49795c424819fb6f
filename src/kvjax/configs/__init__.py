"""ml_collections configs, one per study; the docstring is the command and what it gives."""
