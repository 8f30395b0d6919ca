"""Sources: a local folder or a hub repository pinned to a commit, its files read by range and fetched by digest.

Read first: ``source.py`` (pin, then read), then ``fetch.py`` (resume and verify). huggingface_hub is imported inside
functions only, so that importing this package costs nothing.
"""
