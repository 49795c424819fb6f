"""From sensitivity to a plan: KVTuner's pipeline (arXiv 2502.04420), with better error estimates and searches."""
