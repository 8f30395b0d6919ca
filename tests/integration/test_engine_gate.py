"""Engines that a spec demands: nothing is published without them, and a resumed run asks none twice.

The engine is the transformers of this environment, under a Python that believes to have gptqmodel, whose version the
script states; `make test-engines` runs the pinned environments.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import GraphError, PlanError
from pipeline.graph.convert import RunOptions, VariantOutcome, convert
from pipeline.graph.plan import plan_conversion
from pipeline.observe.events import EngineNews, Event, VariantJudged
from pipeline.publish.reproduce import reproduce_command
from pipeline.settings import Settings, load_settings
from pipeline.spec import Engine, build_spec
from pipeline.storage.running import Announcement
from pipeline.validate.engines import environment
from tests.acceptance.conftest import DEMO_MODEL

FEW = {
    "calibration": {"samples": 8, "length": 64},
    "gates": {"heldout_samples": 2, "heldout_length": 64, "generated_tokens": 16, "engines": ["transformers"]},
}


class Recorder:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


class Machine:
    """A folder with a work store, a target and an engine, whose Python can be exchanged."""

    def __init__(self, root: Path) -> None:
        self.root, self.engine = root, root / "engine"
        self.settings: Settings = dataclasses.replace(load_settings(), cache_dir=root / "cache")
        (root / "out").mkdir()
        (self.engine / "bin").mkdir(parents=True)
        known = self.engine / "gptqmodel-7.6.0.dist-info"
        known.mkdir()
        (known / "METADATA").write_text("Metadata-Version: 2.1\nName: gptqmodel\nVersion: 7.6.0\n")
        self.runs(f'export PYTHONPATH="{self.engine}"\nexec "{sys.executable}" "$@"')

    def runs(self, script: str) -> None:
        """Have the engine's Python be a shell script, which counts how often it is called."""
        python = self.engine / "bin" / "python"
        python.write_text(f'#!/bin/sh\necho >> "{self.root}/calls"\n{script}\n')
        python.chmod(0o755)

    @property
    def num_calls(self) -> int:
        calls = self.root / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def spec(self, *variants: str, **gates: Any) -> Any:
        return build_spec(
            {
                **FEW,
                "source": str(DEMO_MODEL),
                "variants": list(variants),
                "targets": [str(self.root / "out")],
                "gates": {**FEW["gates"], **gates},
            },
            "test",
        )

    def convert(self, *variants: str, sink: Recorder | None = None, **gates: Any) -> list[VariantOutcome]:
        options = RunOptions(self.root / "work", workers=1, inline=True)
        return list(convert(self.spec(*variants, **gates), self.settings, options, sink or Recorder()))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("machine"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "ensure_environment", lambda *arguments: made.engine)
        patch.setattr("pipeline.graph.engines.ensure_environment", lambda *arguments: made.engine)
        yield made


def test_an_engine_that_fails_keeps_a_variant_back_and_is_asked_again(machine: Machine) -> None:
    machine.runs("echo no such kernel >&2; exit 1")
    sink = Recorder()
    (outcome,) = machine.convert("fp8-dynamic", sink=sink)
    assert outcome.locations == ()
    assert [check.name for check in outcome.facts.verdict.failures] == ["engine"]
    assert outcome.facts.verdict.failures[0].detail == "transformers cannot run the release: no such kernel"
    assert not (machine.root / "out" / "releases").exists()
    (judged,) = [event for event in sink.events if isinstance(event, VariantJudged)]
    assert not judged.passed
    before = machine.num_calls
    machine.runs("echo no such kernel >&2; exit 1")
    machine.convert("fp8-dynamic")
    assert machine.num_calls == before + 1


def test_what_an_engine_computes_is_published_with_its_answer_and_asked_once(machine: Machine) -> None:
    machine.runs(f'export PYTHONPATH="{machine.engine}"\nexec "{sys.executable}" "$@"')
    sink, before = Recorder(), machine.num_calls
    (outcome,) = machine.convert("fp8-dynamic", sink=sink)
    check = outcome.facts.verdict.checks[-1]
    assert check.passed, check.detail
    assert (check.name, check.engine) == ("engine", "transformers")
    assert check.figures["tokens_total"] == 48
    assert "gptqmodel 7.6.0" in check.detail
    assert [event.message for event in sink.events if isinstance(event, EngineNews)] == [
        "fp8-dynamic: loading it in transformers"
    ]
    card = (Path(outcome.locations[0]) / "README.md").read_text()
    assert "| `engine` | passed | transformers" in card
    assert "--engine transformers" in reproduce_command(outcome.facts)
    machine.runs("exit 1")
    (again,) = machine.convert("fp8-dynamic")
    assert again == outcome
    assert machine.num_calls == before + 1
    # Another variant is another question; other prompts are, too.
    (other,) = machine.convert("fp8-dynamic", generated_tokens=17)
    assert other.locations == ()


def test_a_variant_that_fails_another_gate_is_not_shown_to_engines(machine: Machine) -> None:
    before = machine.num_calls
    (outcome,) = machine.convert("rtn-w8a8", max_kl=0.0)
    assert [check.name for check in outcome.facts.verdict.failures] == ["divergence"]
    assert "engine" not in [check.name for check in outcome.facts.verdict.checks]
    assert machine.num_calls == before


def test_a_cancelled_job_ends_the_engine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.runs(f'echo $$ > "{machine.root}/pid"; exec sleep 600')
    monkeypatch.setattr(environment, "HEED_S", 0.05)
    monkeypatch.setattr(Announcement, "is_cancelled", lambda self: (machine.root / "pid").exists())
    with pytest.raises(GraphError) as caught:
        machine.convert("gptq-w8a8")
    assert caught.value.code == "graph.cancelled"
    pid = int((machine.root / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_an_engine_that_is_known_not_to_load_a_variant_is_told_before_anything_is_fetched(machine: Machine) -> None:
    for run in (machine.convert, lambda variant: plan_conversion(machine.spec(variant), machine.settings, 1)):
        with pytest.raises(PlanError, match=r"gates\.engines demands transformers, and transformers 5") as e:
            run("gptq-w4.5-g64-gptq")
        assert e.value.code == "plan.engine"


def test_every_engine_has_pinned_requirements_and_a_script() -> None:
    folder = Path(environment.__file__).parent
    for engine in Engine:
        assert (folder / f"run_{engine}.py").is_file()
        assert all("==" in line for line in environment.pinned_requirements(engine).splitlines() if line[:1] != "#")
