"""``bitmill plan --simulate``: forecasts on clusters, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.graph.forecast import Forecast

NUM_WAITS = 4
"""Things waited for that are listed."""


def render_forecast(forecast: Forecast, console: Console) -> None:
    """Print one forecast."""
    prediction, cluster = forecast.prediction, forecast.prediction.cluster
    console.print(
        f"\n[bold]{cluster.nodes} x {cluster.workers} workers[/bold] ({prediction.hardware}), "
        f"{forecast.tokens:,} calibration tokens: simulated"
    )
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
    links = ", ".join(f"{name} {share:.0%}" for name, share in prediction.busy_links.items())
    console.print(f"  busiest links: {links}")
    if forecast.price is not None:
        parts = ", ".join(f"{name} {price:,.2f}" for name, price in forecast.prices.items())
        console.print(f"  price: {forecast.price:,.2f} ({parts})")
    from rich.table import Table

    routes = list(dict.fromkeys(route for moved in prediction.moved_bytes.values() for route in moved))
    table = Table("moved by", *routes, box=None, pad_edge=False)
    for kind, moved in prediction.moved_bytes.items():
        table.add_row(f"  {kind}", *(format_bytes(moved[route]) if route in moved else "-" for route in routes))
    console.print(table)
