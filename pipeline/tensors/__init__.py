"""Weights on disk: safetensors headers, the index over files, reads by byte range, deterministic writes.

Read first: ``header.py`` (what is checked before a tensor is trusted), then ``index.py``.
"""
