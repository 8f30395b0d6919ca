"""Solvers: ``(weight, statistics, scheme) -> QuantizedLinear``. Tensors in, tensors out.

Read first: ``types.py`` (the nouns), then ``grid.py``, ``gptq.py``, ``awq.py``.
"""
