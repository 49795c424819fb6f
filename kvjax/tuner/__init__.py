"""From sensitivity to a plan: KVTuner's pipeline (arXiv 2502.04420) and what predicts and searches better."""
