"""Calibration: texts to tokens to statistics. Read first: ``tokens.py``, then ``forward.py``."""
