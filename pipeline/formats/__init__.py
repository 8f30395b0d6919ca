"""Checkpoint formats: codes and grids to the tensors and configuration that engines read, and back.

Read first: ``codec.py`` (what a format does), then ``gptq.py``, ``awq.py``, ``compressed.py`` (one each),
``config.py`` (the ``quantization_config`` of ``config.json``) and ``loaders.py`` (what loaders cannot read).
"""
