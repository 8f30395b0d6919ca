"""The command line. Read first: ``main.py``. Modules here import torch, ray and the rest only when a command runs."""
