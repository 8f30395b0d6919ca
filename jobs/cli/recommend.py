"""``bitmill recommend``."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

import click
import yaml

from jobs.cli.flags import HELP_NAMES
from jobs.cli.plan import console_for
from pipeline.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.graph.recommend import Recommendation


@click.command("recommend", context_settings=HELP_NAMES, short_help="Say which variant of SOURCE to take, and why.")
@click.argument("source")
@click.option("--memory", required=True, metavar="SIZE", help="Memory of the device, for example 24GB or 80GiB.")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "transformers"]),
    help="What is to load it.  [default: any]",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    metavar="N",
    help="Tokens that the KV cache has room for, no more than the model's own limit.",
)
@click.option("--json", "as_json", is_flag=True, help="The recommendation as JSON.")
def recommend_command(source: str, memory: str, engine: str | None, context: int, as_json: bool) -> int:
    """Say which variant of SOURCE to take, and why. Reads config and safetensors headers only; writes nothing.

    SOURCE is a Hugging Face folder, org/name[@revision] on the hub, or s3://bucket/prefix. Sizes are exact; what a
    variant loses is that of a small model, and stands for the order of variants alone.
    """
    from pipeline.graph.recommend import recommend
    from pipeline.settings import load_settings

    found = recommend(source, memory, engine or "", context, load_settings())
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
        return 0
    _render(found, source, console_for(sys.stdout))
    return 0


def _render(found: Recommendation, source: str, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(found.source)}[/bold]: {format_bytes(found.source_bytes)} of weights", soft_wrap=True)
    console.print(
        f"  in {format_bytes(found.memory_bytes)}: {format_bytes(found.kv_cache_bytes)} for the KV cache of "
        f"{found.context:,} tokens, 1.5 GB for the engine, the rest for weights",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for title in ("", "variant", "weights", "needs", "bits", "KL*"):
        table.add_column(title, no_wrap=True, justify="left" if title in ("", "variant") else "right")
    table.add_column("", overflow="fold")
    best = found.best
    for item in found.candidates:
        why = item.obstacle or ("" if item.fits else "too large")
        sizes = [format_bytes(item.size_bytes), format_bytes(item.needed_bytes)] if item.size_bytes else ["-", "-"]
        style = "bold green" if item is best else "" if item.is_eligible else "dim"
        figures = [f"{item.average_bits:.3g}", f"{item.loss:.3g}"] if item.size_bytes else ["-", "-"]
        table.add_row("->" if item is best else "", item.name, *sizes, *figures, escape(why), style=style)
    console.print(table)
    console.print("  * measured on a 135M model; stands for the order alone", soft_wrap=True)
    console.print(f"\n[bold]{best.name}[/bold]: {'; '.join(found.reasons)}.", soft_wrap=True)
    if best.variant is None:
        words = ["bitmill", "convert", source, "--variant", best.name, "--to", "releases/"]
        console.print(f"  {escape(shlex.join(words))}", soft_wrap=True)
        return
    document = yaml.safe_dump({"variants": [best.variant]}, sort_keys=False, default_flow_style=None)
    console.print("  with this in mix.yaml:", soft_wrap=True)
    for line in document.splitlines():
        console.print(f"    {escape(line)}", soft_wrap=True)
    words = ["bitmill", "convert", source, "--spec", "mix.yaml", "--to", "releases/"]
    console.print(f"  {escape(shlex.join(words))}", soft_wrap=True)
