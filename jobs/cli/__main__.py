"""``python -m jobs.cli``: the same as ``bitmill``."""

from jobs.cli.main import main

main()
