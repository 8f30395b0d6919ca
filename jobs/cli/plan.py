"""``bitmill plan``."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from jobs.cli.flags import HELP_NAMES, default_workers, spec_from_flags, with_spec_flags
from jobs.cli.forecast import render_forecast, render_stages
from pipeline.errors import SpecError
from pipeline.units import format_bytes, format_count, format_duration, parse_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.graph.plan import PlanReport, VariantReport

UNLIMITED_COLUMNS = 100_000
"""A width that nothing reaches; what is not a terminal has none."""


@click.command("plan", context_settings=HELP_NAMES, short_help="Show what converting SOURCE would do.")
@with_spec_flags
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="K",
    help="Workers to estimate the time for.  [default: processors]",
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Memory of a worker, for example 1.5GB, in simulations too: a conversion that cannot be cut to fit is "
    "refused.  [default: as much as it takes]",
)
@click.option(
    "--simulate",
    "clusters",
    multiple=True,
    metavar="nodes=N,gpus=G",
    help="Also predict the conversion on N machines of G GPUs each (or cpus=C); with samples=S, length=L and slice=Q "
    "other calibration sequences than the spec's. Repeatable.",
)
@click.option(
    "--address",
    envvar="RAY_ADDRESS",
    metavar="HOST:PORT",
    help="Also predict the conversion on the Ray cluster there, with as many workers as it has room for, or K. "
    "Nothing is started on it.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="What workers of that cluster compute on; auto takes its GPUs where it has some.  [default: auto]",
)
@click.option(
    "--shape",
    metavar="NAME",
    help="Instead of SOURCE, a well-known model of which nothing is read: llama-3.1-8b, llama-3.1-70b, "
    "llama-3.1-405b or deepseek-v3. Needs --simulate or --address.",
)
@click.option(
    "--matrices", is_flag=True, help="Also list every matrix of every block; experts that are alike are one row."
)
@click.option("--json", "as_json", is_flag=True, help="The whole plan as JSON.")
def plan_command(
    workers: int | None,
    max_memory: str | None,
    clusters: tuple[str, ...],
    address: str | None,
    device: str,
    shape: str | None,
    matrices: bool,
    as_json: bool,
    source: str | None,
    **flags: Any,
) -> int:
    """Show what converting SOURCE would do. Reads config and safetensors headers only; writes nothing.

    SOURCE is a Hugging Face folder, org/name[@revision] on the hub, or s3://bucket/prefix.

    Times are predicted by running the real driver over the real work units on a simulated clock.
    """
    from pipeline.graph.forecast import forecast_shape, parse_cluster, request_for
    from pipeline.graph.plan import plan_conversion
    from pipeline.settings import load_settings

    if shape and (source or not (clusters or address)):
        raise SpecError(
            "--shape stands for a SOURCE of which nothing is read, and needs --simulate or --address",
            code="spec.shape",
            hint="for example: bitmill plan --shape llama-3.1-8b --variant gptq-w4-g128 --simulate nodes=1,gpus=8",
        )
    spec = spec_from_flags(command="plan", source=shape or source, targets=("nowhere",), **flags)
    requests = [parse_cluster(text) for text in clusters]
    max_bytes = parse_bytes(max_memory) if max_memory else None
    report = None
    if address:
        from pipeline.graph.cluster import look_at

        requests.append(request_for(address, look_at(address, device, workers, max_bytes)))
    if shape:
        forecasts = forecast_shape(shape, spec, requests, max_bytes)
    else:
        report, forecasts = plan_conversion(spec, load_settings(), workers or default_workers(), max_bytes, requests)
    if as_json:
        plan = report.as_dict() if report else {"source": shape}
        click.echo(json.dumps({**plan, "simulated": [item.as_dict() for item in forecasts]}, indent=2))
        return 0
    console = console_for(sys.stdout)
    if report:
        _render(report, console, matrices)
    for item in forecasts:
        render_forecast(item, console)
    return 0


def console_for(stream: TextIO) -> Console:
    """Return a console as wide as the terminal; what goes to a file or a pipe is as wide as it needs to be."""
    from rich.console import Console

    return Console(file=stream, highlight=False, width=None if stream.isatty() else UNLIMITED_COLUMNS)


def _render(report: PlanReport, console: Console, matrices: bool) -> None:
    commit = f" at {report.commit}" if report.commit else ""
    console.print(f"[bold]{report.source}[/bold]{commit}", soft_wrap=True)
    console.print(
        f"  {report.architecture}, {format_count(report.num_parameters)} parameters in {report.num_blocks} "
        f"blocks, {format_bytes(report.size_bytes)}"
    )
    console.print(
        f"  calibration {report.calibration_tokens:,} tokens, held-out {report.heldout_tokens:,} tokens: "
        f"{report.calibrate_flops:.3g} FLOPs for all variants together"
    )
    console.print(
        f"  memory per worker up to {format_bytes(report.worker_bytes)}, and {format_bytes(report.held_bytes)} of "
        f"passing outputs there or on its disk; work directory up to "
        f"{format_bytes(report.work_bytes)}"
    )
    console.print(
        f"  about {format_duration(report.seconds)} with {report.workers} workers (each {report.hardware}); "
        f"longest waited for: {report.bottleneck}"
    )
    if report.price is not None:
        console.print(f"  price: {report.price:,.2f}")
    render_stages(report.stages, console)
    for variant in report.variants:
        _render_variant(report, variant, console)
        if matrices:
            _render_matrices(variant, console)


def _render_variant(report: PlanReport, variant: VariantReport, console: Console) -> None:
    from rich.markup import escape

    console.print(f"\n[bold]{variant.name}[/bold] ({variant.format}), to be released as {variant.release}")
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

    from pipeline.graph.expert_rows import fold_experts

    table = Table(box=None, pad_edge=False)
    for title in ("block", "linear", "shape", "bits", "group", "in", "out", "note"):
        # A name or a note that is too long goes on in the next line, whole; numbers stay in one.
        table.add_column(title, overflow="fold", no_wrap=title not in ("linear", "note"))
    for row, count in fold_experts(variant.matrices):
        table.add_row(
            str(row.block),
            row.name if count == 1 else f"{row.name} (x{count})",
            f"{row.out_features} x {row.in_features}",
            str(row.bits) if row.group_size else "-",
            str(row.group_size or "-"),
            format_bytes(row.bytes_in),
            format_bytes(row.bytes_out),
            row.note,
        )
    console.print(table)
