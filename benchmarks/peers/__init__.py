"""Bitmill against other tools: the same job for each, one decoder and one score for all.

Read ``jobs.py`` first: what a job is and who can do it. ``decoder.py`` reads what every tool wrote, ``scoring.py``
scores it, ``runs.py`` starts and measures the tools, ``environments.py`` makes what they run in.
"""
