"""What happens to a model: from a pinned source to a verified, published release.

Read first: ``spec.py`` (what to make), ``graph/convert.py`` (how the parts are put together).
"""
