"""Thin programs over kvjax: python -m experiments.NAME --config=configs/NAME.py --workdir=DIR."""
