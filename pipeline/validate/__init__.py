"""Gates: is this release what it promises to be? Read first: ``gates.py`` (the verdict), then ``dense.py`` and
``divergence.py`` (what it is computed from) and ``release.py`` (the same questions asked of a published release)."""
