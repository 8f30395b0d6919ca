"""A release's facts on a terminal, and as JSON.

The table of modules has as many of its columns as the console has room for beside whole names, and folds names rather
than cut them where it has none; without a terminal there are no colours.
"""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import BaseModel
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline.facts import UNQUANTIZED_BITS, ModuleFacts, ReleaseFacts
from pipeline.observe.terminal import one_line
from pipeline.publish import figures
from pipeline.units import format_bytes, format_count

_MODULE_FIGURES = ("rel. error", "weight error", "loss", "damping", "shrunk", "clip", "exponent")
_ROUNDS = "rounds"
"""Column of the rounds of refinement; there for variants that ask for some."""
_TOKENS = "tokens"
"""Column of the calibration tokens that the router sent to an expert; there for models that have some."""
_GAP = 3
"""Columns of the console between two of a table."""
MAX_LISTED = 20
"""Lines of one list in the summary; the rest is counted."""


def render_summary(facts: ReleaseFacts, console: Console) -> None:
    """Print what the release is, its verdict, its figures against their budgets, and whatever went otherwise."""
    word = Text("PASSED", style="bold green") if facts.verdict.passed else Text("FAILED", style="bold red")
    console.print(Text.assemble((one_line(facts.release), "bold"), "  ", word), soft_wrap=True)
    console.print(Padding(_identity(facts), (0, 0, 1, 2), expand=False))
    console.print(Padding(_judged(facts), (0, 0, 0, 2), expand=False))
    if facts.siblings:
        console.print(Padding(_family(facts), (1, 0, 0, 2), expand=False))
    failures = [f"{check.name}: {check.detail}" for check in facts.verdict.failures]
    _print_list(console, "Failed checks", "bold red", failures)
    degradations = [f"{module}: {text}" for module, text in figures.list_degradations(facts)]
    _print_list(console, "Degradations", "bold yellow", degradations)
    _print_list(console, "Cautions", "bold yellow", list(facts.cautions))
    _print_list(console, "Other than the scheme", "bold", _fold_lines(figures.list_exceptions(facts)))
    dropped = figures.fold_names(sorted(facts.dropped.items()))
    _print_list(console, "Dropped from the source", "bold", _fold_lines(dropped))


def render_modules(facts: ReleaseFacts, console: Console) -> None:
    """Print one row per linear, in the order of the facts, and below the table what is to be said of some of them."""
    is_refined, has_experts = facts.variant.refinement > 0, bool(figures.expert_layers(facts))
    shown = ["linear", "shape", "bits", "group", *((_TOKENS,) if has_experts else ())]
    titles = [*shown, *_MODULE_FIGURES, *((_ROUNDS,) if is_refined else ())]
    budget = facts.verdict.budgets.max_relative_error
    rows = []
    for module in facts.modules:
        tokens = ["-" if module.expert_tokens is None else f"{module.expert_tokens}"] if has_experts else []
        rounds = [f"{module.refinement_rounds}"] if is_refined else []
        rows.append([*_module_cells(module), *tokens, *_module_figures(module, budget), *rounds])
    widths = [max(map(_width, column)) for column in zip(titles, *rows, strict=True)]
    # The first figure in any case; of the others, as many as leave names whole.
    fitting = [n for n in range(len(shown) + 1, len(titles) + 1) if sum(widths[:n]) + _GAP * (n - 1) <= console.width]
    num_columns = max(fitting, default=len(shown) + 1)
    table = _table()
    table.add_column(titles[0], overflow="fold")
    for title in titles[1:num_columns]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row[:num_columns])
    console.print(table)
    notes = [(module.name, text) for module in facts.modules for text in _module_notes(module) if text]
    _print_list(console, "Notes", "bold", _fold_lines(figures.fold_names(notes)), limit=len(notes))


def facts_as_json(facts: ReleaseFacts) -> str:
    """Return the facts as indented JSON with a final newline, the same text for equal facts.

    Fields stand in the order of the model, keys of mappings in alphabetical order. Numbers that JSON cannot hold are
    the strings ``NaN``, ``Infinity`` and ``-Infinity``, which ``ReleaseFacts.model_validate_json`` reads back.
    """
    return json.dumps(_plain(facts), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {key: _plain(value[key]) for key in sorted(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _identity(facts: ReleaseFacts) -> Table:
    source, calibration, quality = facts.source, facts.calibration, facts.quality
    rows = {
        "source": f"{source.name} ({source.place}, {source.commit[:12]}), {source.architecture}, "
        f"{format_count(source.num_parameters)} parameters",
        "variant": f"{facts.variant.name}: {figures.describe_scheme(facts.variant, facts.modules)}, "
        f"{facts.variant.format} format",
        "size": f"{format_bytes(source.size_bytes)} -> {format_bytes(facts.size_bytes)}, "
        f"{figures.size_ratio(facts):.2f} times smaller, {figures.bits_per_parameter(facts):.2f} bits per parameter",
        "calibration": f"{calibration.text}, {calibration.samples} x {calibration.length} tokens"
        + figures.describe_schedule(facts.variant),
        "held-out": f"{quality.heldout_text}, {quality.heldout_tokens} tokens: "
        f"perplexity {quality.perplexity:.4g} (source {quality.source_perplexity:.4g}), KL {quality.kl:.4g}, "
        f"top-1 agreement {100 * quality.top1_agreement:.2f} %",
    }
    if widths := figures.width_rows(facts):
        rows["widths"] = "; ".join(f"{', '.join(row.kinds)} {row.bits} bits in blocks {row.blocks}" for row in widths)
    if layers := figures.expert_layers(facts):
        rows["experts"] = figures.describe_experts(facts, layers)
    if quality.heldout_overlap:
        rows["held-out"] += f"; calibration has seen {100 * quality.heldout_overlap:.2f} % of it"
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, Text(one_line(text)))
    return table


def _judged(facts: ReleaseFacts) -> Table:
    table = _table()
    table.add_column("figure", overflow="fold")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("budget", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in figures.judge(facts):
        kept = Text("") if row.kept is None else Text("ok", "green") if row.kept else Text("EXCEEDED", "bold red")
        table.add_row(row.name, row.value, row.budget, kept)
    return table


def _family(facts: ReleaseFacts) -> Table:
    table = _table()
    table.add_column("variant", overflow="fold")
    for title in ("weights", "KL", "perplexity"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in figures.family(facts):
        mark = " (this one)" if row.is_this else "" if row.passed else " (not published)"
        name = Text(one_line(row.variant) + mark, style="bold" if row.is_this else "" if row.passed else "dim")
        table.add_row(name, format_bytes(row.size_bytes), f"{row.kl:.4g}", f"{row.perplexity:.4g}")
    return table


def _module_cells(module: ModuleFacts) -> list[str | Text]:
    shape = f"{module.out_features} x {module.in_features}"
    bits = "-" if module.bits >= UNQUANTIZED_BITS else str(module.bits)
    return [Text(one_line(module.name)), shape, bits, figures.group_word(module)]


def _module_figures(module: ModuleFacts, budget: float | None) -> list[str | Text]:
    """Return the cells below ``_MODULE_FIGURES``."""
    if module.bits >= UNQUANTIZED_BITS:
        return ["-"] * len(_MODULE_FIGURES)
    is_over = budget is not None and not module.relative_error <= budget
    return [
        Text(f"{100 * module.relative_error:.2f} %", style="bold red" if is_over else ""),
        f"{100 * module.weight_error:.2f} %",
        f"{module.loss:.3g}",
        f"{module.damping:.3g}" if module.damping else "-",
        f"{module.shrinkage:.3f}" if module.shrinkage else "-",
        "-" if module.clip is None else f"{module.clip:.3f}",
        "-" if module.awq_exponent is None else f"{module.awq_exponent:.3g}",
    ]


def _module_notes(module: ModuleFacts) -> tuple[str, ...]:
    dead = f"{module.dead_inputs} of {module.in_features} inputs were zero on all tokens" if module.dead_inputs else ""
    return (module.note, *module.degradations, dead)


def _width(cell: str | Text) -> int:
    return cell.cell_len if isinstance(cell, Text) else cell_len(cell)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 1))


def _fold_lines(rows: tuple[figures.Folded, ...]) -> list[str]:
    counts = [f" (x{row.count})" if row.count > 1 else "" for row in rows]
    return [f"{row.pattern}{count}: {row.text}" for row, count in zip(rows, counts, strict=True)]


def _print_list(console: Console, title: str, style: str, lines: list[str], limit: int = MAX_LISTED) -> None:
    if not lines:
        return
    console.print()
    console.print(Text(title, style=style))
    for line in lines[:limit]:
        console.print(Text(f"  {one_line(line)}"), soft_wrap=True)
    if len(lines) > limit:
        console.print(f"  and {len(lines) - limit} more", highlight=False)
