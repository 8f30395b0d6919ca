"""Imports point one way, and each heavy library has one owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIERS = [
    {"jobs"},
    {"graph"},
    {"validate", "publish", "calibrate"},
    {"quantize", "formats", "tensors", "hub", "storage", "skeleton", "observe"},
    {
        "compiled",
        "precision",
        "spec",
        "variants",
        "strict",
        "facts",
        "settings",
        "errors",
        "disk",
        "finite",
        "fingerprint",
        "heap",
        "strict_json",
        "units",
        "weights",
    },
]
ALLOWED_SIBLINGS = {("formats", "quantize")}
OWNERS = {
    "ray": "graph",
    "boto3": "storage",
    "botocore": "storage",
    "huggingface_hub": "hub",
    "transformers": "skeleton",
    "numba": "compiled",
    "triton": "quantize",
}
STANDALONE = ("jobs/demo/train.py", "pipeline/validate/engines/run_")
"""Scripts that run elsewhere: the training of the demo model, and what an engine's environment runs."""


def modules() -> list[tuple[str, str, ast.Module]]:
    """Return (path, package, syntax tree) of every module of the project."""
    found = []
    for top in ("pipeline", "jobs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(STANDALONE):
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            package = "jobs" if top == "jobs" else parts[1] if len(parts) > 1 else "pipeline"
            found.append((name, package, ast.parse(path.read_text())))
    return found


def imports(tree: ast.Module) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names.append("pipeline." + "." * node.level)  # a relative import hides where it points
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from pipeline import spec` names the module after the import.
            whole = node.module in ("pipeline", "jobs", "os")
            names += [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
    return names


def tier(package: str) -> int:
    return next(number for number, packages in enumerate(TIERS) if package in packages)


def wrong_directions(found: list[tuple[str, str, ast.Module]]) -> list[str]:
    wrong = []
    for name, package, tree in found:
        for imported in imports(tree):
            parts = imported.split(".")
            if parts[0] not in ("pipeline", "jobs") or package == "__init__":
                continue
            target = "jobs" if parts[0] == "jobs" else parts[1]
            if not target:
                wrong.append(f"{name} has a relative import")
                continue
            same = target == package
            allowed = same or tier(target) > tier(package) or (package, target) in ALLOWED_SIBLINGS
            # Values at the bottom may build on each other.
            if not allowed and not (tier(package) == tier(target) == len(TIERS) - 1):
                wrong.append(f"{name} imports {imported}")
    return wrong


def foreign_libraries(found: list[tuple[str, str, ast.Module]]) -> list[str]:
    return [
        f"{name} imports {imported}"
        for name, package, tree in found
        for imported in imports(tree)
        if (owner := OWNERS.get(imported.split(".")[0])) and owner != package
    ]


def environment_readers(found: list[tuple[str, str, ast.Module]]) -> list[str]:
    variables = ("environ", "environb", "getenv", "putenv")
    return [
        name
        for name, _, tree in found
        if any(isinstance(node, ast.Attribute) and node.attr in variables for node in ast.walk(tree))
        or any(imported.removeprefix("os.") in variables for imported in imports(tree))
    ]


def test_imports_point_one_way() -> None:
    assert wrong_directions(modules()) == []


def test_each_heavy_library_has_one_owner() -> None:
    assert foreign_libraries(modules()) == []


def test_only_settings_reads_the_environment() -> None:
    assert environment_readers(modules()) == ["pipeline/settings.py"]


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("quantize", "from pipeline.formats.codec import codec_for"),
        ("validate", "import pipeline.publish.card"),
        ("calibrate", "from pipeline.validate import gates"),
        ("publish", "from pipeline.calibrate.tokens import Text"),
        ("tensors", "from pipeline.graph.dag import Kind"),
        ("spec", "from pipeline.quantize.types import Scheme"),
        ("graph", "from jobs.cli import main"),
        ("formats", "from pipeline import storage"),
        ("formats", "def late():\n    from pipeline.hub.card import read_card"),
        ("hub", "from ..storage import s3"),
    ],
)
def test_an_import_against_the_order_is_found(package: str, line: str) -> None:
    assert len(wrong_directions([("m.py", package, ast.parse(line))])) == 1


@pytest.mark.parametrize(
    "line", ["import ray", "from boto3.session import Session", "import huggingface_hub.errors", "import transformers"]
)
def test_a_heavy_library_outside_its_owner_is_found(line: str) -> None:
    assert len(foreign_libraries([("m.py", "validate", ast.parse(line))])) == 1


@pytest.mark.parametrize(
    "line", ["import os\nos.environ['A']", "from os import getenv", "import os as o\no.getenv('A')"]
)
def test_a_look_at_the_environment_is_found(line: str) -> None:
    assert environment_readers([("m.py", "hub", ast.parse(line))]) == ["m.py"]


def test_one_module_knows_what_a_full_disk_is() -> None:
    """Everybody else asks it, so that no package forgets the quota."""
    known = [
        name
        for name, _, tree in modules()
        if any(isinstance(node, ast.Attribute) and node.attr in ("ENOSPC", "EDQUOT") for node in ast.walk(tree))
    ]
    assert known == ["pipeline/disk.py"]


def test_no_module_is_called_after_nothing() -> None:
    stems = {part for name, _, _ in modules() for part in Path(name).with_suffix("").parts}
    assert stems & {"utils", "helpers", "common", "misc", "util"} == set()


def test_command_line_starts_without_heavy_libraries() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'boto3', 'huggingface_hub', 'rich'}"
    code = f"import sys, jobs.cli.main; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
