"""Gates: is this release what it promises to be? Read first: ``gates.py`` (the verdict), then ``dense.py`` and
``divergence.py`` (what it is computed from), ``release.py`` (the same questions asked of a published release) and
``agreement.py`` (whether two ways of computing it choose the same tokens)."""
