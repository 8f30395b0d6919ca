"""Which variant is recommended: the least loss that fits and is loaded, with sizes as the plan states them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli.recommend import recommend_command
from pipeline.errors import PlanError, SpecError
from pipeline.graph.plan import plan_conversion
from pipeline.graph.recommend import LOSSES, WIDTH_LOSSES, Recommendation, recommend
from pipeline.settings import load_settings
from pipeline.spec import build_spec, parse_variant
from tests.architectures import make_model

CONTEXT = 256


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough for widths to matter beside what an engine takes itself."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    return make_model("llama", tmp_path_factory.mktemp("llama") / "llama", **sizes)


def asked(source: Path, memory: str, engine: str = "") -> Recommendation:
    return recommend(str(source), memory, engine, CONTEXT, load_settings())


def test_every_variant_that_is_looked_at_is_called_so_and_wider_ones_lose_less() -> None:
    assert [parse_variant(name).name for name in LOSSES] == list(LOSSES)
    assert list(LOSSES.values()) == sorted(LOSSES.values())
    widths = sorted(WIDTH_LOSSES)
    assert [WIDTH_LOSSES[width] for width in widths] == sorted(WIDTH_LOSSES.values(), reverse=True)


def test_sizes_are_those_of_the_plan(llama: Path) -> None:
    found = {item.name: item for item in asked(llama, "24GB").candidates}
    assert set(found) == set(LOSSES)
    spec = build_spec({"source": str(llama), "variants": list(LOSSES), "targets": ["nowhere"]}, "test")
    report, _ = plan_conversion(spec, load_settings(), 1)
    assert {item.name: item.size_bytes for item in report.variants} == {n: item.size_bytes for n, item in found.items()}


def test_less_memory_never_loses_less_and_what_is_taken_fits(llama: Path) -> None:
    everything = asked(llama, "24GB")
    assert everything.best.name == "rtn-w8-g128"
    assert "the source fits as it is" in " ".join(everything.reasons)
    needs = sorted(item.needed_bytes for item in everything.candidates)
    losses, names = [], set()
    for memory in range(needs[-1] + 1_000_000, needs[0], -1_500_000):
        found = asked(llama, f"{memory}B")
        assert found.best.needed_bytes <= memory
        assert all(item.loss >= found.best.loss for item in found.candidates if item.is_eligible)
        losses.append(found.best.loss)
        names.add(found.best.name)
    assert losses == sorted(losses)
    assert {"rtn-w8-g128", "mix"} <= names


def test_a_mix_is_what_its_spec_gives(llama: Path) -> None:
    needs = {item.name: item.needed_bytes for item in asked(llama, "24GB").candidates}
    memory = f"{(needs['gptq-w5-g128'] + needs['gptq-w6-g128']) // 2}B"
    found = asked(llama, memory)
    best = found.best
    assert best.name == "mix"
    assert 5 < best.average_bits < 6
    assert LOSSES["gptq-w6-g128"] < best.loss < LOSSES["gptq-w5-g128"]
    assert "the next better, gptq-w6-g128, needs" in " ".join(found.reasons)
    spec = build_spec({"source": str(llama), "variants": [best.variant], "targets": ["nowhere"]}, "test")
    (report,) = plan_conversion(spec, load_settings(), 1)[0].variants
    assert report.size_bytes == best.size_bytes
    shown = CliRunner().invoke(recommend_command, [str(llama), "--memory", memory, "--context", str(CONTEXT)])
    assert shown.exit_code == 0, shown.output
    assert f"memory: {memory}" in shown.output
    assert shown.output.endswith(f"bitmill convert {llama} --spec mix.yaml --to releases/\n")


def test_only_what_the_engine_loads_is_taken(llama: Path, tmp_path: Path) -> None:
    needs = {item.name: item.needed_bytes for item in asked(llama, "24GB").candidates}
    memory = f"{needs['gptq-w5-g128']}B"
    vllm = asked(llama, memory, "vllm")
    refused = {item.name for item in vllm.candidates if item.obstacle}
    assert refused == {"gptq-w6-g128", "gptq-w5-g128", "gptq-w3-g128-ct", "gptq-w3-g128"}
    assert vllm.best.variant is None or vllm.best.variant["mix"]["choices"] == [4, 8]
    gpt_neox = asked(make_model("gpt_neox", tmp_path / "gpt_neox"), "24GB", "transformers")
    assert "awq-gptq-w4-g128" in {item.name for item in gpt_neox.candidates if item.obstacle}


def test_nothing_that_fits_is_an_error_that_says_what_would(llama: Path) -> None:
    with pytest.raises(PlanError, match="no variant of llama that vllm loads fits into 1 GB") as caught:
        asked(llama, "1GB", "vllm")
    assert caught.value.code == "plan.recommend"
    assert "shorter --context" in caught.value.hint
    with pytest.raises(SpecError, match="'24x' is no size"):
        asked(llama, "24x")


def test_the_command_says_which_and_why_and_what_to_type(llama: Path) -> None:
    runner = CliRunner()
    words = [str(llama), "--memory", "24GB", "--engine", "vllm", "--context", str(CONTEXT)]
    shown = runner.invoke(recommend_command, words)
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.output.splitlines()]
    assert ["->", "rtn-w8-g128"] in [row[:2] for row in rows]
    assert shown.output.endswith(f"bitmill convert {llama} --variant rtn-w8-g128 --to releases/\n")
    stated = json.loads(runner.invoke(recommend_command, [*words, "--json"]).output)
    assert stated["best"] == "rtn-w8-g128"
    assert [item["name"] for item in stated["candidates"]] == [
        item.name for item in asked(llama, "24GB", "vllm").candidates
    ]
