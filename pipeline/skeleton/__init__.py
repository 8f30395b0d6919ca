"""The model without its weights: a transformers model on the meta device, its decoder blocks, its linear groups.

Read first: ``model.py`` (``Skeleton``), then ``groups.py`` (which linears share an input) and ``smoothing.py`` (which
layer produces it); ``limits.py`` says how long sequences may be. The only package that imports transformers, besides
the checks that run inside an engine.
"""
