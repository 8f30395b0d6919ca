"""Reference pages made from the code: the command line, the spec, the errors.

``python -m jobs.cli.reference docs/reference`` writes them; a test compares the committed pages with what this gives.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from jobs.cli.main import cli
from pipeline import errors
from pipeline.spec import (
    CalibrationSpec,
    ClusterSpec,
    ConversionSpec,
    GateSpec,
    MixSpec,
    PriceSpec,
    PromptSpec,
    Strict,
    VariantSpec,
)

SPECS: tuple[tuple[type[Strict], str], ...] = (
    (ConversionSpec, "the top level"),
    (VariantSpec, "an entry of `variants`"),
    (MixSpec, "`mix` of a variant"),
    (CalibrationSpec, "`calibration`"),
    (GateSpec, "`gates`"),
    (ClusterSpec, "`cluster`"),
    (PriceSpec, "`cluster.prices`"),
    (PromptSpec, "an entry of `gates.prompts`"),
)


def pages() -> dict[str, str]:
    """Return every reference page by file name."""
    return {"cli.md": cli_page(), "spec.md": spec_page(), "errors.md": errors_page()}


def cli_page() -> str:
    """Return the page of the command line: each command's own help."""
    parts = ["# The command line\n"]
    with click.Context(cli, info_name="bitmill", **cli.context_settings) as group:
        for name in cli.list_commands(group):
            command = cli.commands[name]
            parts += _command_parts(f"bitmill {name}", name, command, group)
    return "\n".join(parts)


def _command_parts(title: str, name: str, command: click.Command, parent: click.Context) -> list[str]:
    """Return what is said of a command, and of those in it."""
    with click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100) as own:
        parts = [f"## {title}\n\n```\n{command.get_help(own)}\n```\n"]
        if isinstance(command, click.Group):
            for inner in command.list_commands(own):
                parts += _command_parts(f"{title} {inner}", inner, command.commands[inner], own)
    return parts


def spec_page() -> str:
    """Return the page of the spec: each key with type, default and meaning."""
    parts = ["# The spec\n\nA YAML file for `--spec`. Flags override it; unknown keys are refused.\n"]
    for model, where in SPECS:
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        schema = model.model_json_schema()["properties"]
        for key, field in model.model_fields.items():
            default = (
                "required" if field.is_required() else f"`{_default(field.get_default(call_default_factory=True))}`"
            )
            meaning = " ".join((field.description or "").split())
            rows.append(f"| `{key}` | {_kind(schema[key])} | {default} | {meaning} |")
        parts.append(f"## {model.__name__}: {where}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _default(value: object) -> str:
    if isinstance(value, Strict):
        return "the defaults below"
    if isinstance(value, tuple):
        return f"{len(value)} entries" if value else "none"
    return "null" if value is None else str(value) or '""'


def _kind(schema: dict[str, object]) -> str:
    for key in ("anyOf", "allOf"):
        if isinstance(options := schema.get(key), list):
            return " or ".join(dict.fromkeys(_kind(option) for option in options))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{value}`" for value in values) if isinstance(values, list) else ""
    return str(schema.get("type") or str(schema.get("$ref", "")).rpartition("/")[2])


def errors_page() -> str:
    """Return the page of errors: class, code, exit status, meaning."""
    rows = ["# Errors\n", "| error | code starts as | exit status | meaning |", "|---|---|---|---|"]
    for name, found in vars(errors).items():
        if inspect.isclass(found) and issubclass(found, errors.PipelineError):
            meaning = (found.__doc__ or "").splitlines()[0]
            rows.append(f"| `{name}` | `{found.default_code}` | {found.exit_status} | {meaning} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write the pages into the folder that is named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
