"""With --json every line on standard error is an event, also when a conversion cannot start or fails."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import DEMO_MODEL, SMALL, Bitmill

VARIANT = ("--variant", "rtn-w4-g128")


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "env", "status", "code", "words"),
    [
        (["SOURCE", *VARIANT, "--spec", "SPEC"], {}, 2, "spec.invalid", ["spec.yaml", "smaples"]),
        (["SOURCE", "--variant", "gptq-w7-g128"], {}, 2, "spec.variant", ["gptq-w7-g128"]),
        (["SOURCE"], {}, 2, "spec.missing", ["--variant NAME is missing"]),
        (["./nowhere", *VARIANT], {}, 3, "source.no_folder", ["./nowhere"]),
        (["SOURCE", *VARIANT], {"BITMILL_CACHE": "~nosuchuser123/x"}, 2, "spec.cache", ["~nosuchuser123/x"]),
        (["SOURCE", *VARIANT, "--workers", "0"], {}, 2, "usage", ["--workers"]),
        (["SOURCE", *VARIANT, "--frobnicate"], {}, 2, "usage", ["--frobnicate"]),
    ],
)
def test_what_cannot_start_is_one_event(
    arguments: list[str],
    env: dict[str, str],
    status: int,
    code: str,
    words: list[str],
    bitmill: Bitmill,
    tmp_path: Path,
) -> None:
    (tmp_path / "spec.yaml").write_text("calibration: {smaples: 3}\n")
    (tmp_path / "out").mkdir()
    places = {"SOURCE": str(DEMO_MODEL), "SPEC": str(tmp_path / "spec.yaml")}
    chosen = [places.get(word, word) for word in arguments]
    done = bitmill("convert", *chosen, "--to", tmp_path / "out", "--json", env=env)
    assert done.returncode == status, done.stderr
    (event,) = events(done)
    assert (event["event"], event["code"]) == ("failed", code)
    assert event["hint"]
    for word in words:
        assert word in event["message"]
    assert done.stdout == ""


def test_a_failed_gate_ends_in_one_event_and_nothing_else_is_said(bitmill: Bitmill, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("gates: {max_kl: 1.0e-9}\n")
    (tmp_path / "out").mkdir()
    places = ("--spec", tmp_path / "spec.yaml", "--to", tmp_path / "out")
    done = bitmill("convert", DEMO_MODEL, *VARIANT, *SMALL, *places, "--json")
    assert done.returncode == 5, done.stderr
    found = events(done)
    assert [event["code"] for event in found if event["event"] == "failed"] == ["gate.failed"]
    assert "divergence: KL" in found[-1]["message"]
    assert "under `gates`" in found[-1]["hint"]
    assert [event["passed"] for event in found if event["event"] == "variant_judged"] == [False]


def test_a_folder_with_any_name_is_released_under_what_can_be_published_of_it(bitmill: Bitmill, tmp_path: Path) -> None:
    source = tmp_path / "_my model"
    shutil.copytree(DEMO_MODEL, source)
    (tmp_path / "out").mkdir()
    done = bitmill("convert", source, "--variant", "rtn-w8-g128", *SMALL, "--to", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = events(done)
    assert [event["release"] for event in found if event["event"] == "published"] == ["local/my-model-rtn-w8-g128"]
    assert any("'_my model'" in event["message"] for event in found if event["event"] == "warned")
    (location,) = done.stdout.splitlines()
    assert Path(location).parent == tmp_path / "out" / "releases" / "local" / "my-model-rtn-w8-g128"
