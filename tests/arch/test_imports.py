"""Imports point one way, and each heavy library has one owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIERS = [
    {"jobs"},
    {"graph"},
    {"validate", "publish", "calibrate"},
    {"quantize", "formats", "tensors", "hub", "storage", "skeleton", "observe"},
    {"spec", "facts", "settings", "errors", "fingerprint", "units"},
]
ALLOWED_SIBLINGS = {("formats", "quantize")}
OWNERS = {
    "ray": "graph",
    "boto3": "storage",
    "botocore": "storage",
    "huggingface_hub": "hub",
    "transformers": "skeleton",
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
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


def tier(package: str) -> int:
    return next(number for number, packages in enumerate(TIERS) if package in packages)


def test_imports_point_one_way() -> None:
    wrong = []
    for name, package, tree in modules():
        for imported in imports(tree):
            parts = imported.split(".")
            if parts[0] not in ("pipeline", "jobs") or package == "__init__":
                continue
            target = "jobs" if parts[0] == "jobs" else parts[1]
            same = target == package
            allowed = same or tier(target) > tier(package) or (package, target) in ALLOWED_SIBLINGS
            # Values at the bottom may build on each other.
            if not allowed and not (tier(package) == tier(target) == len(TIERS) - 1):
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_each_heavy_library_has_one_owner() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name, package, tree in modules()
        for imported in imports(tree)
        if (owner := OWNERS.get(imported.split(".")[0])) and owner != package
    ]
    assert wrong == []


def test_only_settings_reads_the_environment() -> None:
    wrong = [
        name
        for name, _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and name != "pipeline/settings.py"
    ]
    assert wrong == []


def test_no_module_is_called_after_nothing() -> None:
    stems = {Path(name).stem for name, _, _ in modules()}
    assert stems & {"utils", "helpers", "common", "misc", "util"} == set()


def test_command_line_starts_without_heavy_libraries() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'boto3', 'huggingface_hub', 'rich'}"
    code = f"import sys, jobs.cli.main; print(sorted(set(sys.modules) & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
