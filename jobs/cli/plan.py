"""``bitmill plan``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from jobs.cli.flags import default_workers, spec_from_flags, with_spec_flags
from pipeline.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.graph.plan import PlanReport, VariantReport


@click.command("plan")
@with_spec_flags
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="K",
    help="Workers to estimate the time for.  [default: processors]",
)
@click.option("--matrices", is_flag=True, help="Also list every matrix of every block.")
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON.")
def plan_command(workers: int | None, matrices: bool, as_json: bool, **flags: Any) -> int:
    """Show what converting SOURCE would do. Reads config and safetensors headers only; writes nothing."""
    from pipeline.graph.plan import plan_conversion
    from pipeline.settings import load_settings

    spec = spec_from_flags(targets=("nowhere",), **flags)
    report = plan_conversion(spec, load_settings(), workers or default_workers())
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return 0
    from rich.console import Console

    _render(report, Console(highlight=False), matrices)
    return 0


def _render(report: PlanReport, console: Console, matrices: bool) -> None:
    commit = f" at {report.commit}" if report.commit else ""
    console.print(f"[bold]{report.source}[/bold]{commit}", soft_wrap=True)
    console.print(
        f"  {report.architecture}, {format_count(report.num_parameters)} parameters in {report.num_blocks} "
        f"blocks, {format_bytes(report.size_bytes)}"
    )
    console.print(
        f"  calibration {report.calibration_tokens:,} tokens, held-out {report.heldout_tokens:,} tokens: "
        f"{report.calibrate_flops:.3g} FLOPs, once for all variants"
    )
    console.print(
        f"  memory per worker up to {format_bytes(report.worker_bytes)}; work directory up to "
        f"{format_bytes(report.work_bytes)}"
    )
    console.print(
        f"  about {format_duration(report.seconds)} with {report.workers} workers of "
        f"{report.rate / 1e9:.0f} GFLOP/s (one thread of this machine, measured now)"
    )
    for variant in report.variants:
        _render_variant(report, variant, console)
        if matrices:
            _render_matrices(variant, console)


def _render_variant(report: PlanReport, variant: VariantReport, console: Console) -> None:
    from rich.markup import escape

    console.print(f"\n[bold]{variant.name}[/bold] ({variant.format})")
    console.print(
        f"  {format_bytes(report.size_bytes)} -> {format_bytes(variant.size_bytes)}, "
        f"{report.size_bytes / variant.size_bytes:.2f} times smaller; "
        f"{variant.num_quantized} of {variant.num_linears} linears quantized; "
        f"solve {variant.solve_flops:.3g} FLOPs, evaluate {variant.evaluate_flops:.3g}"
    )
    for note, count in variant.notes.items():
        console.print(f"  [yellow]{count} linears: {note}[/yellow]")
    for caution in variant.cautions:
        console.print(f"  [yellow]{caution}[/yellow]")
    for limit in variant.limits:
        console.print(f"  [{'yellow' if limit.loads else 'red'}]{escape(limit.text)}[/]")
    fits = [device for device, does in variant.fits.items() if does]
    where = f"from {fits[0]} up" if fits else "none of the common devices"
    console.print(
        f"  fits: {where} (weights, {format_bytes(report.kv_cache_bytes)} KV cache for one sequence of "
        f"{report.kv_cache_tokens:,} tokens, 1.5 GB for the engine)"
    )


def _render_matrices(variant: VariantReport, console: Console) -> None:
    from rich.table import Table

    table = Table("block", "linear", "shape", "bits", "group", "in", "out", "note", box=None, pad_edge=False)
    for row in variant.matrices:
        table.add_row(
            str(row.block),
            row.name,
            f"{row.out_features} x {row.in_features}",
            str(row.bits),
            str(row.group_size or "-"),
            format_bytes(row.bytes_in),
            format_bytes(row.bytes_out),
            row.note,
        )
    console.print(table)
