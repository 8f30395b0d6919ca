"""Sources: a local folder, or a hub repository or a folder in a bucket pinned to a commit; read by range, or fetched.

Read first: ``source.py`` (pin, then read), then ``fetch.py`` (resume and verify). huggingface_hub is imported inside
functions only, so that importing this package costs nothing.
"""
