"""Engine checks: an unmodified inference engine in an environment of its own, compared with the project's loader.

Read first: ``environment.py``. ``run_transformers.py`` is run by the engine's own Python and imports nothing of ours.
"""
