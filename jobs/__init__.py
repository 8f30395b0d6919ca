"""What runs: the command line and, later, the queue, the watcher and the server.

Read first: ``cli/main.py``.
"""
