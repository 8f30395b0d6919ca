"""Mixed precision from calibration to published files: widths are chosen, kept to the budget, and read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipeline.facts import ReleaseFacts, weights_by_width
from pipeline.graph.convert import RunOptions, convert
from pipeline.graph.dag import Kind
from pipeline.observe.events import JobRevised, JobStarted, Phase, StageFinished, WidthsChosen
from pipeline.publish.card import render_card
from pipeline.settings import Settings
from pipeline.spec import average_width, build_spec
from tests.architectures import make_model, published_net, source_net
from tests.integration.test_architectures import (
    ERROR_FACTOR,
    Converted,
    convert_folder,
    logits_of,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE_BYTES = 2_290_000
VARIANTS: tuple[str | dict[str, Any], ...] = (
    "gptq-w4.25-g64",
    "gptq-w4.25-g64-gptq",
    "awq-w3.5-g64",
    {"name": "sized", "method": "rtn", "group_size": 64, "mix": {"weights": f"{SIZE_BYTES}B"}},
    {"name": "given", "method": "gptq", "group_size": 64, "widths": {"re:down_proj$": 8}},
    "gptq-w4-g64-ct",
)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp("mixed")
    # Errors of 3-bit linears of random weights are large, and are not what is tried here.
    gates = {"max_relative_error": None}
    return convert_folder(make_model("llama", root / "llama"), root / "out", VARIANTS, gates=gates)


def facts_of(converted: Converted, name: str) -> ReleaseFacts:
    return converted.outcomes[name].facts


@pytest.mark.parametrize("name", ["gptq-w4.25-g64", "gptq-w4.25-g64-gptq", "awq-w3.5-g64"])
def test_the_average_is_kept(converted: Converted, name: str) -> None:
    facts = facts_of(converted, name)
    widths = weights_by_width(facts.modules)
    wanted = facts.variant.mix.average_bits if facts.variant.mix else 0.0
    assert len(widths) > 1
    assert wanted - 0.35 < average_width(widths) <= wanted
    assert all(module.predicted_kl is not None and module.predicted_kl > 0 for module in facts.modules)


def test_files_are_no_larger_than_asked_for(converted: Converted) -> None:
    facts = facts_of(converted, "sized")
    assert len(weights_by_width(facts.modules)) > 1
    assert 0.97 * SIZE_BYTES < facts.size_bytes <= SIZE_BYTES


def test_given_widths_are_made(converted: Converted) -> None:
    for module in facts_of(converted, "given").modules:
        assert module.bits == (8 if module.name.endswith("down_proj") else 4)
        assert module.predicted_kl is None


@pytest.mark.parametrize("name", ["gptq-w4.25-g64", "gptq-w4.25-g64-gptq", "awq-w3.5-g64", "sized", "given"])
def test_published_files_compute_what_the_report_states(converted: Converted, name: str) -> None:
    error = relative_error(
        logits_of(published_net(converted.folder(name), converted.source)), logits_of(source_net(converted.source))
    )
    stated = math.sqrt(sum(module.relative_error**2 for module in facts_of(converted, name).modules))
    assert 0 < error < ERROR_FACTOR * stated


@pytest.mark.parametrize("name", ["gptq-w4.25-g64", "sized", "given"])
def test_transformers_reads_several_widths(converted: Converted, name: str) -> None:
    folder = converted.folder(name)
    loaded = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    assert relative_error(loaded, logits_of(published_net(folder, converted.source))) < 0.02


def test_less_is_predicted_than_of_one_width(converted: Converted) -> None:
    """What is chosen is the least that was predicted: no more than one width for all was, within the same budget."""
    mixed, sized = facts_of(converted, "gptq-w4.25-g64"), facts_of(converted, "sized")
    uniform = facts_of(converted, "gptq-w4-g64-ct")
    assert mixed.quality.kl < uniform.quality.kl
    assert sized.verdict.passed
    assert mixed.verdict.passed


def test_the_card_says_which_blocks_have_which_widths(converted: Converted) -> None:
    card = render_card(facts_of(converted, "gptq-w4.25-g64"))
    assert "bits on average" in card or "on average) GPTQ" in card
    assert "| linears | bits | in blocks |" in card
    assert "| linears | bits | in blocks |" not in render_card(facts_of(converted, "gptq-w4-g64-ct"))


class Seen:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def emit(self, event: object) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def test_a_rerun_finds_everything_and_progress_adds_up(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "llama")
    settings = Settings("http://127.0.0.1:9", None, tmp_path / "cache", s3_endpoint=None, ray_address=None)
    spec = build_spec(
        {
            "source": str(source),
            "variants": ["gptq-w4.5-g64"],
            "targets": [str(tmp_path / "out")],
            "calibration": {"samples": 8, "length": 64},
            "gates": {
                "max_relative_error": None,
                "max_kl": None,
                "max_perplexity_ratio": None,
                "heldout_samples": 2,
                "heldout_length": 32,
                "generated_tokens": 8,
            },
        },
        "test",
    )
    options = RunOptions(tmp_path / "work", workers=1, inline=True)
    published = []
    for is_again in (False, True):
        sink = Seen()
        (outcome,) = convert(spec, settings, options, sink)
        published.append((outcome.facts, outcome.locations))
        (started,) = [event for event in sink.events if isinstance(event, JobStarted)]
        (revised,) = [event for event in sink.events if isinstance(event, JobRevised)]
        assert {phase.phase for phase in started.work} == set(Phase)
        before = sum(isinstance(event, StageFinished) for event in sink.events[: sink.events.index(revised)])
        stages = [event for event in sink.events if isinstance(event, StageFinished)]
        assert len(stages) == before + sum(phase.num_units for phase in revised.left)
        assert all(event.reused for event in stages) == is_again
        (chosen,) = [event for event in sink.events if isinstance(event, WidthsChosen)]
        assert sum(chosen.linears.values()) == len(outcome.facts.modules)
    assert published[0] == published[1]
    assert {folder.name for folder in (tmp_path / "work").iterdir()} >= {Kind.SENSE.value, Kind.APPRAISE.value}
