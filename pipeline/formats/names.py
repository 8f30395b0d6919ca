"""Which linears a configuration means: names, patterns that cover them, and rules read back.

Engines match linears by name, regular expression or class. A model has the same linears in every block, so a pattern
with the numbers left open covers a whole column of them; it is only used where all its matches are meant. Engines that
fuse linears (q, k, v into ``qkv_proj``) ask under the fused name, so a pattern for all parts comes with one for the
whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.quantize.types import Scheme
from pipeline.spec import PER_CHANNEL, Format

FUSED_LEAVES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Names under which vLLM asks for linears that it fuses, with their parts."""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def cover(meant: Iterable[str], every: Iterable[str]) -> list[str]:
    """Return anchored regular expressions, in order of first appearance, that match exactly the names ``meant``
    among ``every``: one for a whole column of blocks where all of it is meant, else one for each name."""
    wanted = dict.fromkeys(meant)
    strangers = {_template(name) for name in every if name not in wanted}
    patterns = {
        _escape(name, keep_numbers=_template(name) in strangers or _NUMBER.search(name) is None): None
        for name in wanted
    }
    return list(patterns)


def with_fused(patterns: Sequence[str]) -> list[str]:
    """Return the patterns of ``cover`` and, after them, one for each fused linear all of whose parts they cover."""
    known = set(patterns)
    fused: dict[str, None] = {}
    for pattern in patterns:
        for whole, parts in FUSED_LEAVES.items():
            stem = pattern.removesuffix(f"{parts[0]}$")
            if stem != pattern and all(f"{stem}{part}$" in known for part in parts):
                fused[f"{stem}{whole}$"] = None
    return [*patterns, *fused]


def in_block_names(quantized: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Return what ends the names in ``quantized`` but none in ``kept``: names inside the block where these tell them
    apart (``self_attn.q_proj``), else full names."""
    quantized, kept = list(quantized), list(kept)
    short = list(dict.fromkeys(_inside_block(name) for name in quantized))
    is_ambiguous = any(name.endswith(ending) for name in kept for ending in short)
    return quantized if is_ambiguous else short


def is_in_block(name: str) -> bool:
    """Return whether the name has a number among its parts, as everything inside a repeated block has."""
    return _NUMBER.search(name) is not None


def block_path(name: str) -> str:
    """Return what stands before the first number of a name inside a block: ``model.layers``."""
    found = _NUMBER.search(name)
    return name[: found.start()].rstrip(".") if found else ""


def _inside_block(name: str) -> str:
    found = _NUMBER.search(name)
    return name[found.end() + 1 :] if found else name


def _template(name: str) -> str:
    return _NUMBER.sub("#", name)


def _escape(name: str, keep_numbers: bool) -> str:
    if keep_numbers:
        return f"^{re.escape(name)}$"
    parts = (r"\d+" if _NUMBER.fullmatch(part) else re.escape(part) for part in name.split("."))
    return "^" + r"\.".join(parts) + "$"


@dataclass(frozen=True)
class Rule:
    """What a configuration says of the linears that ``is_meant`` accepts: their grid, with a group size of -1 where
    groups are whole rows, or None for unquantized."""

    is_meant: Callable[[str], bool]
    grid: Scheme | None


@dataclass(frozen=True)
class ModuleSchemes:
    """A ``quantization_config`` read back: which linears are quantized, and how.

    Attributes:
        format: Format of all quantized linears.
        rules: In order; the first that accepts a name decides, and none means unquantized.
    """

    format: Format
    rules: tuple[Rule, ...]

    def scheme(self, name: str, in_features: int) -> Scheme | None:
        """Return the linear's grid, with a whole-row group as ``in_features``; None when it is unquantized."""
        for rule in self.rules:
            if rule.is_meant(name):
                is_whole_row = rule.grid is not None and rule.grid.group_size == PER_CHANNEL
                return replace(rule.grid, group_size=in_features) if rule.grid and is_whole_row else rule.grid
        return None
