"""What a conversion says while it runs: events, and the sinks that show them.

Read first: ``events.py`` (what can be said), then ``progress.py`` (who shows it) and ``tally.py`` (what is left to do).
"""
