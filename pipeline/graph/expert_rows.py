"""Tables of linears with the experts of a block in one row, where nothing but their number differs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from pipeline.graph.plan import MatrixRow

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def fold_experts(rows: Sequence[MatrixRow]) -> list[tuple[MatrixRow, int]]:
    """Return rows with how many linears each stands for: those of a block's experts that are alike are one, with ``*``
    for their numbers, and bytes that are those of all. The order is that of the first of each."""
    folded: dict[MatrixRow, list[MatrixRow]] = {}
    for row in rows:
        folded.setdefault(replace(row, name=_NUMBER.sub("*", row.name)), []).append(row)
    return [
        (
            replace(
                alike if len(members) > 1 else members[0],
                bytes_in=sum(member.bytes_in for member in members),
                bytes_out=sum(member.bytes_out for member in members),
            ),
            len(members),
        )
        for alike, members in folded.items()
    ]
