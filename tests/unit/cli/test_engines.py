"""``bitmill engines``: which engines there are, where, and their installation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli.main import run
from pipeline.validate.engines import environment


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "pinned_requirements", lambda engine: "# nothing to install\npip\n")
    return tmp_path


def test_an_engine_is_listed_with_the_command_that_installs_it_and_then_with_its_folder(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["engines", "list"]) == 0
    assert capsys.readouterr().out == "transformers  not installed: bitmill engines install transformers\n"
    assert run(["engines", "install", "transformers"]) == 0
    captured = capsys.readouterr()
    folder = Path(captured.out.strip())
    assert folder.parent == cache / "engines"
    assert (folder / "bin" / "python").exists()
    assert captured.err.startswith("installing transformers into")
    assert run(["engines", "install", "transformers"]) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")
    assert run(["engines", "list"]) == 0
    assert capsys.readouterr().out == f"transformers  {folder}\n"
    assert run(["engines", "list", "--json"]) == 0
    stated = [{"engine": "transformers", "installed": True, "folder": str(folder)}]
    assert json.loads(capsys.readouterr().out) == stated


def test_an_unknown_engine_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["engines", "install", "vllm"]) == 2
    assert "'vllm' is not 'transformers'" in capsys.readouterr().err
