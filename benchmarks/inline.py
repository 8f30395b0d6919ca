"""A conversion without Ray: every unit in this process, events as JSON lines on standard error.

``scaling.py`` runs this beside ``bitmill convert --json`` to see what Ray costs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.graph.convert import RunOptions, convert
from pipeline.observe.progress import ProgressMode, make_sink
from pipeline.settings import load_settings
from pipeline.spec import load_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--work-dir", type=Path, required=True)
    args = parser.parse_args()
    options = RunOptions(args.work_dir, workers=1, inline=True)
    with make_sink(ProgressMode.JSON, sys.stderr) as sink:
        outcomes = convert(load_spec(args.spec, {}), load_settings(), options, sink)
    sys.exit(0 if all(outcome.locations for outcome in outcomes) else 5)


if __name__ == "__main__":
    main()
