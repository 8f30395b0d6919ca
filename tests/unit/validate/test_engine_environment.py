"""An engine's environment that cannot be made, and an engine that cannot run a release."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import EngineError
from pipeline.validate.engines import environment
from pipeline.validate.engines.environment import RECORD, check_engine, ensure_environment


@pytest.fixture
def lines() -> list[str]:
    return []


def test_a_package_that_does_not_exist_ends_in_pip_s_words_and_is_tried_again(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = "bitmill-absent-engine @ file:///nowhere/bitmill_absent_engine-1.0-py3-none-any.whl"
    monkeypatch.setattr(environment, "pinned_requirements", lambda engine: f"# pins\n{absent}\n")
    for attempt in (1, 2):
        with pytest.raises(EngineError, match="cannot install the engine") as caught:
            ensure_environment("transformers", tmp_path, lines.append)
        assert "/nowhere/bitmill_absent_engine" in caught.value.message
        assert caught.value.code == "engine.install"
        assert "run the same command again" in caught.value.hint
        assert len(lines) == attempt
    assert not list(tmp_path.rglob(RECORD))


def test_an_environment_is_installed_once(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "pinned_requirements", lambda engine: "# nothing to install\npip\n")
    # Mirrors and caches of this machine are the installation's, not the engine's.
    monkeypatch.setenv("PIP_LOG", str(tmp_path / "pip.log"))
    first = ensure_environment("transformers", tmp_path, lines.append)
    assert (first / "bin" / "python").exists()
    assert (tmp_path / "pip.log").is_file()
    assert ensure_environment("transformers", tmp_path, lines.append) == first
    assert len(lines) == 1
    monkeypatch.setattr(environment, "pinned_requirements", lambda engine: "# other pins\npip\n")
    assert ensure_environment("transformers", tmp_path, lines.append) != first


def test_an_engine_sees_neither_our_credentials_nor_our_hub_folder(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "engine" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nenv > "{tmp_path}/seen"\nls -A "$HF_HOME" > "{tmp_path}/hub"\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(environment, "ensure_environment", lambda *arguments: tmp_path / "engine")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "release").mkdir()
    prompts = [("a", [1, 2])]
    check = check_engine(
        "transformers", tmp_path / "release", lambda ids: torch.zeros(2, 4), prompts, 2, tmp_path, lines.append
    )
    assert not check.passed
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert "hf_secret" not in seen.values()
    assert seen["HF_HOME"] != str(tmp_path)
    assert (tmp_path / "hub").read_text() == ""


def test_an_engine_that_fails_gives_a_failed_check_with_its_last_words(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ensure_environment", lambda *arguments: Path(sys.prefix))
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "config.json").write_text('{"model_type": "unheard_of"}')
    prompts = [("a", [1, 2])]
    check = check_engine(
        "transformers", tmp_path / "release", lambda ids: torch.zeros(2, 4), prompts, 2, tmp_path, lines.append
    )
    assert not check.passed
    assert "transformers cannot run the release" in check.detail
    assert "unheard_of" in check.detail


def test_what_is_known_stands_in_the_place_of_a_traceback(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ensure_environment", lambda *arguments: Path(sys.prefix))
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    known = ["This engine cannot read it.", "Another one can."]
    check = check_engine(
        "transformers", tmp_path, lambda ids: torch.zeros(2, 4), [("a", [1, 2])], 2, tmp_path, lines.append, known
    )
    assert not check.passed
    assert check.detail.endswith(" ".join(known))
    assert 'File "' not in check.detail
    assert "\n" not in check.detail


def test_a_program_that_is_not_wanted_any_more_or_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "HEED_S", 0.02)
    command = ["sh", "-c", f'echo $$ > "{tmp_path}/pid"; exec sleep 600']

    def heed() -> None:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        environment._run(command, heed)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    with pytest.raises(subprocess.TimeoutExpired):
        environment._run(command, lambda: None, timeout_s=0.1)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_what_a_program_says_is_what_it_complains_of_else_what_it_tells() -> None:
    assert environment._run(["sh", "-c", "echo told; echo ' wrong ' >&2; exit 3"], lambda: None) == (3, "wrong")
    assert environment._run(["sh", "-c", "echo told"], lambda: None) == (0, "told")
