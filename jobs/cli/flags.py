"""Flags that ``convert`` and ``plan`` share, and the spec that they make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.errors import SpecError
from pipeline.precision import Precision
from pipeline.spec import ConversionSpec, Engine, build_spec, load_spec

Command = TypeVar("Command", bound=Callable[..., Any])

HELP_NAMES = {"help_option_names": ["-h", "--help"]}
"""Context settings of every command, so that each has both whether it is called in the group or alone."""

SPEC_FLAGS = (
    click.argument("source", required=False),
    click.option(
        "--variant",
        "variants",
        multiple=True,
        metavar="NAME",
        help="What to make, for example gptq-w4-g128, gptq-w3-g64, awq-w4-g128, rtn-w8-g128, gptq-w4-g64-ct; with a "
        "decimal point an average width, as gptq-w4.25-g64: mixed precision. Repeatable.",
    ),
    click.option(
        "--spec",
        "spec_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="YAML spec with everything; flags override it. See docs/reference/spec.md.",
    ),
    click.option(
        "--calibration",
        metavar="FILE|NAME",
        help="Calibration text: builtin, a .txt, .jsonl or .parquet file, or hub:org/name[@rev]:path. "
        "Plain text gives its first N x L tokens in order.  [default: builtin]",
    ),
    click.option("--samples", type=int, metavar="N", help="Calibration sequences.  [default: 128]"),
    click.option("--length", type=int, metavar="L", help="Tokens in a calibration sequence.  [default: 512]"),
    click.option("--seed", type=int, metavar="S", help="Order in which documents are drawn.  [default: 0]"),
    click.option("--heldout", metavar="FILE|NAME", help="Held-out text for the divergence gate.  [default: builtin]"),
    click.option("--heldout-samples", type=int, metavar="N", help="Held-out sequences.  [default: 16]"),
    click.option("--heldout-length", type=int, metavar="L", help="Tokens in a held-out sequence.  [default: 512]"),
    click.option(
        "--engine",
        "engines",
        multiple=True,
        type=click.Choice([engine.value for engine in Engine]),
        help="Publish only what this engine was seen to compute as the reference does. Repeatable.",
    ),
    click.option(
        "--precision",
        type=click.Choice([choice.value for choice in Precision]),
        help="Factors of matrix products while texts pass the blocks.  [default: bfloat16]",
    ),
    click.option("--release", metavar="NAMESPACE/NAME", help="Prefix of the releases' names.  [default: the source's]"),
)

EXAMPLES = {
    "plan": "bitmill plan org/model --variant gptq-w4-g128",
    "convert": "bitmill convert org/model --variant gptq-w4-g128 --to releases/",
}
"""What each command that takes these flags needs at least."""


def with_spec_flags(command: Command) -> Command:
    """Add the flags of ``SPEC_FLAGS`` to a command, in their order."""
    for flag in reversed(SPEC_FLAGS):
        command = flag(command)
    return command


def spec_from_flags(
    *,
    command: str,
    source: str | None,
    variants: tuple[str, ...],
    spec_file: Path | None,
    targets: tuple[str, ...],
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
    heldout: str | None,
    heldout_samples: int | None,
    heldout_length: int | None,
    engines: tuple[str, ...],
    precision: str | None,
    release: str | None,
) -> ConversionSpec:
    """Return the spec that flags and, if given, a spec file mean.

    Args:
        command: The command that is told, to be named in the example when a word is missing. The others are the flags.

    Raises:
        SpecError: naming the key or flag that is missing or wrong.
    """
    given = {
        "source": source,
        "variants": list(variants) or None,
        "targets": list(targets) or None,
        "release": release,
        "precision": precision,
        "calibration": _given({"text": calibration, "samples": samples, "length": length, "seed": seed}),
        "gates": _given(
            {
                "heldout": heldout,
                "heldout_samples": heldout_samples,
                "heldout_length": heldout_length,
                "engines": list(engines) or None,
            }
        ),
    }
    data = _given(given)
    if spec_file is not None:
        return load_spec(spec_file, data)
    for key, words in (("source", "SOURCE"), ("variants", "--variant NAME"), ("targets", "--to TARGET")):
        if key not in data:
            raise SpecError(
                f"{words} is missing",
                code="spec.missing",
                hint=f"for example: {EXAMPLES[command]} ; or put everything into a file and give --spec FILE",
            )
    return build_spec(data, where="flags")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, {})}


def default_workers() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
