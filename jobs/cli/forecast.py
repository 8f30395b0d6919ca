"""``bitmill plan --simulate``: forecasts on clusters, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.units import format_bytes, format_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from pipeline.graph.forecast import Forecast, StageRow

NUM_WAITS = 4
"""Things waited for that are listed."""


def render_forecast(forecast: Forecast, console: Console) -> None:
    """Print one forecast."""
    prediction, cluster = forecast.prediction, forecast.prediction.cluster
    where = f"{forecast.address}: {cluster.words}" if forecast.address else cluster.words
    console.print(f"\n[bold]{where}[/bold] ({prediction.hardware}), {forecast.tokens:,} calibration tokens: simulated")
    console.print(
        f"  {format_duration(prediction.seconds)}, one worker {format_duration(forecast.one_worker_s)}: "
        f"efficiency {forecast.efficiency:.2f}; {prediction.num_units:,} work units, "
        f"workers compute {prediction.busy_share:.0%} of the time"
    )
    waits = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in list(prediction.waits.items())[:NUM_WAITS])
    console.print(
        f"  bottleneck: {prediction.bottleneck} (the end waits for {waits}); fewer than half of the workers busy for "
        f"the last {format_duration(prediction.tail_s)}"
    )
    console.print(
        f"  memory per worker up to {format_bytes(forecast.memory.total)}, and {format_bytes(prediction.held_bytes)} "
        f"of passing outputs there or on its disk"
    )
    if forecast.short_bytes:
        console.print(
            f"  [yellow]{format_bytes(forecast.short_bytes)} less than that are there for each worker: take fewer "
            "--workers, or say what they may use with --max-memory[/yellow]"
        )
    if forecast.free_workers is not None and forecast.free_workers < cluster.num_workers:
        console.print(
            f"  [yellow]room for {forecast.free_workers} of {cluster.num_workers} workers at the moment: others wait "
            "until what else runs there leaves[/yellow]"
        )
    links = ", ".join(f"{name} {share:.0%}" for name, share in prediction.busy_links.items())
    console.print(f"  busiest links: {links}")
    if forecast.price is not None:
        parts = ", ".join(f"{name} {price:,.2f}" for name, price in forecast.prices.items())
        console.print(f"  price: {forecast.price:,.2f} ({parts})")
    render_stages(forecast.stages, console)


def render_stages(rows: Sequence[StageRow], console: Console) -> None:
    """Print what each stage takes and moves: a line for each kind of unit, in the order in which they begin."""
    from rich.table import Table

    routes = list(dict.fromkeys(route for row in rows for route in row.stage.moved_bytes))
    is_priced = any(row.price is not None for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True, min_width=11)
    titles = ["units", "compute", "from - to", "memory", *routes, *(["price"] if is_priced else [])]
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    for row in rows:
        stage = row.stage
        table.add_row(
            f"  {stage.kind.value}",
            f"{stage.num_units:,}",
            f"{stage.compute_s:,.1f} s",
            f"{stage.begin_s:,.1f} - {stage.end_s:,.1f} s",
            format_bytes(row.worker_bytes) if row.worker_bytes else "-",
            *(format_bytes(stage.moved_bytes[route]) if route in stage.moved_bytes else "-" for route in routes),
            *([f"{row.price:,.2f}"] if row.price is not None else []),
        )
    console.print(table)
