"""Rows of finished runs and scores, one JSON object a line: kept when everything else is deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "results.jsonl"


class Results:
    """The rows of a folder."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; a line that a killed process left unfinished is none."""
        self._file = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = list(_rows(self._file)) if self._file.is_file() else []
        whole = "".join(json.dumps(row) + "\n" for row in self._rows)
        if self._file.is_file() and self._file.read_text() != whole:
            self._file.write_text(whole)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, which is on disk when this returns."""
        with self._file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        self._rows.append(row)

    def runs(self, key: str) -> list[dict[str, Any]]:
        """Return the runs of a key that made a checkpoint, in the order they ran."""
        return [row for row in self._rows if row["kind"] == "run" and row["key"] == key and not row["exit_status"]]

    def failure(self, key: str) -> str:
        """Return how the last run of a key failed, empty when it did not or there was none."""
        runs = [row for row in self._rows if row["kind"] == "run" and row["key"] == key]
        if not runs or not runs[-1]["exit_status"]:
            return ""
        return f"exit status {runs[-1]['exit_status']}: {' / '.join(runs[-1]['said'])}"

    def score(self, key: str) -> dict[str, Any] | None:
        """Return the score of a key."""
        found = [row for row in self._rows if row["kind"] == "score" and row["key"] == key]
        return found[-1] if found else None


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
