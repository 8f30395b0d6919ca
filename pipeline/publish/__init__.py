"""What a release says about itself: the card, its plots, and the report on a terminal.

Read first: ``card.py`` with ``templates/card.md.jinja``, then ``figures.py`` (the numbers that both derive).
"""
