"""Token sequences from a text: a shipped text, a file, or a file of a dataset repository.

Plain text gives its first ``samples * length`` tokens in order. A ``.jsonl`` or ``.parquet`` file gives its ``text``
column, the documents drawn in an order fixed by the seed and joined by blank lines; nulls of a .parquet file are no
documents. No special tokens are added.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import CalibrationError
from pipeline.facts import OVERLAP_TOKENS
from pipeline.fingerprint import digest_bytes
from pipeline.hub.dataset import fetch_dataset_file
from pipeline.settings import Settings

BUILTIN = "builtin"
BUILTIN_FILES = {"calibration": "calibration.txt", "heldout": "heldout.txt"}
"""The shipped texts; see ``jobs/demo/train.py`` for where they come from."""

HASH_BASE = 0x5DEECE66D
"""Odd and large, so that runs of small token ids spread over all 64 bits."""

CHARS_PER_READ = 4_000_000
"""Text is tokenized in pieces of this many characters until there are enough tokens; pieces end at a line break."""

MAX_NAMED = 8
"""Columns that a message spells out; the rest is counted."""


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences and where they come from.

    Attributes:
        tokens_NL: int64 [samples, length].
        provenance: ``builtin``, a file's name, or the dataset file with its commit.
        digest: SHA-256 of the ids (int32, little-endian, row after row).
    """

    tokens_NL: Tensor
    provenance: str
    digest: str


@dataclass(frozen=True)
class Text:
    """A text and its provenance, before it is tokenized."""

    content: str
    provenance: str


def load_text(
    text: str, purpose: str, seed: int, settings: Settings, sleep: Callable[[float], None] = time.sleep
) -> Text:
    """Return the text that a spec names.

    Args:
        text: ``builtin``, a path, or ``hub:org/name[@revision]:path``.
        purpose: ``calibration`` or ``heldout``: which shipped text ``builtin`` means.
        seed: Order of the documents of a .jsonl or .parquet file.
        settings: Where the hub is.
        sleep: Waits between attempts when the hub limits or drops us.

    Raises:
        CalibrationError: when the file is missing, unreadable or has no ``text`` column.
    """
    if text == BUILTIN:
        path = resources.files("pipeline.calibrate") / "data" / BUILTIN_FILES[purpose]
        return Text(path.read_text(encoding="utf-8"), f"{BUILTIN}:{purpose}")
    if text.startswith("hub:"):
        file, provenance = fetch_dataset_file(text, settings, sleep=sleep)
    else:
        file, provenance = Path(text), Path(text).name
    try:
        return Text(_read(file.expanduser(), seed), provenance)
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: the home folder of nobody
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CalibrationError(
            f"{purpose} text {text:.200} cannot be read: {reason}",
            code="calibration.unreadable",
            hint="give a UTF-8 text file, a .jsonl or .parquet file with a `text` column, or `builtin`",
        ) from error


def _read(file: Path, seed: int) -> str:
    match file.suffix:
        case ".jsonl" | ".parquet":
            documents = _documents(file)
            random.Random(seed).shuffle(documents)
            return "\n\n".join(documents)
        case _:
            return file.read_text(encoding="utf-8")


def _documents(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            names = parquet.read_schema(file).names
            if "text" not in names:
                raise _no_text_column(file, f"it has {_listed(names)}")
            column = parquet.read_table(file, columns=["text"])["text"]
        except ArrowException as error:
            raise _no_text_column(file, f"it cannot be read as Parquet: {_first_line(error)}") from error
        texts = [text for text in column.to_pylist() if text is not None]
        if not all(isinstance(text, str) for text in texts):
            raise _no_text_column(file, f"it holds {column.type}")
        return [text for text in texts if text]
    # Line feeds only: other line separators may stand unescaped inside a JSON string.
    lines = file.read_text(encoding="utf-8").split("\n")
    return [_document(line, file, number) for number, line in enumerate(lines, 1) if line.strip()]


def _document(line: str, file: Path, number: int) -> str:
    """Return the text of one line of a .jsonl file."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else _first_line(error)
        raise _no_text_column(file, f"line {number} is not JSON: {reason}") from error
    if not isinstance(document, dict):
        raise _no_text_column(file, f"line {number} is not a JSON object")
    if "text" not in document:
        raise _no_text_column(file, f"line {number} has {_listed(list(document))}")
    text = document["text"]
    if not isinstance(text, str):
        raise _no_text_column(file, f"line {number}: its text is {json.dumps(text):.60}")
    return text


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return "only " + ", ".join(f"`{name}`" for name in names[:MAX_NAMED]) + more if names else "nothing"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _no_text_column(file: Path, reason: str) -> CalibrationError:
    return CalibrationError(
        f"{file.name} has no readable `text` column: {reason}",
        code="calibration.column",
        hint="every document needs a string under the key `text`",
    )


def coverage_cautions(num_tokens: int, widths: Iterable[int]) -> tuple[str, ...]:
    """Return what is to be said when calibration has fewer tokens than linears have inputs.

    T tokens span at most T directions of an input: in the others the second moment is zero, a solver sees no error
    there, and damping decides.

    Args:
        num_tokens: Calibration tokens.
        widths: in_features of every linear that is quantized.
    """
    short = sorted(width for width in widths if width > num_tokens)
    if not short:
        return ()
    return (
        f"{num_tokens:,} calibration tokens cannot cover the inputs of {len(short)} linears, up to {short[-1]:,} wide: "
        "their errors are only known in part",
    )


def overlap(calibration: TokenBatch, heldout: TokenBatch) -> float:
    """Return the share of held-out tokens that lie in a run of OVERLAP_TOKENS that the calibration tokens hold too.

    Sequences of a batch follow one another in its text, so runs may cross their borders. Held-out tokens that are fewer
    than a run count as one. Runs are found by a 64-bit hash and then compared token by token, so the share is exact.
    """
    seen_N, asked_N = calibration.tokens_NL.flatten(), heldout.tokens_NL.flatten()
    width = min(OVERLAP_TOKENS, asked_N.numel())
    if seen_N.numel() < width:
        return 0.0
    seen_hash_N, asked_hash_N = _window_hashes(seen_N, width), _window_hashes(asked_N, width)
    candidates = torch.isin(seen_hash_N, asked_hash_N).nonzero().flatten().tolist()
    runs = {tuple(seen_N[start : start + width].tolist()) for start in candidates}
    is_covered_N = torch.zeros(asked_N.numel(), dtype=torch.bool)
    for start in torch.isin(asked_hash_N, seen_hash_N).nonzero().flatten().tolist():
        if tuple(asked_N[start : start + width].tolist()) in runs:
            is_covered_N[start : start + width] = True
    return int(is_covered_N.sum()) / is_covered_N.numel()


def _window_hashes(tokens_N: Tensor, width: int) -> Tensor:
    """Return a polynomial hash, int64 [N - width + 1] (modulo 2**64), of every run of ``width`` tokens."""
    hash_N = torch.zeros(tokens_N.numel() - width + 1, dtype=torch.int64)
    for offset in range(width):
        hash_N = hash_N * HASH_BASE + tokens_N[offset : offset + hash_N.numel()]
    return hash_N


def take_tokens(
    text: Text, encode: Callable[[str], Sequence[int]], samples: int, length: int, skip: int = 0
) -> TokenBatch:
    """Return the first ``samples * length`` tokens of ``text`` after the first ``skip``, in order.

    Raises:
        CalibrationError: when the text is too short, saying how many tokens it has and how many are needed.
    """
    needed = skip + samples * length
    ids: list[int] = []
    start = 0
    while len(ids) < needed and start < len(text.content):
        end = text.content.find("\n", start + CHARS_PER_READ) + 1 or len(text.content)
        ids.extend(encode(text.content[start:end]))
        start = end
    if len(ids) < needed:
        fits = max((len(ids) - skip) // length, 0)
        raise CalibrationError(
            f"{text.provenance} has {len(ids):,} tokens, but {samples} x {length} are needed"
            + (f" after the first {skip:,}" if skip else ""),
            code="calibration.too_short",
            hint=f"give a longer text, or at most --samples {fits} at this length" if fits else "give a longer text",
        )
    tokens_NL = torch.tensor(ids[skip:needed], dtype=torch.int64).view(samples, length)
    return TokenBatch(tokens_NL, text.provenance, digest_bytes(tokens_NL.to(torch.int32).numpy().tobytes()))
