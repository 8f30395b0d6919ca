"""What a plan says before anything is computed: sizes, work, memory, and sequences that are too long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PlanError
from pipeline.graph.build import make_variant_plan, quantized_groups
from pipeline.graph.chains import shape_of
from pipeline.graph.cost import cost_model
from pipeline.graph.memory import plan_memory
from pipeline.graph.naming import name_releases
from pipeline.graph.outline import open_folder
from pipeline.graph.plan import PlanReport, plan_conversion, report_plan, require_positions
from pipeline.hub.source import pin_source
from pipeline.settings import Settings
from pipeline.spec import ConversionSpec
from tests.architectures import make_model

MakeSpec = Callable[..., ConversionSpec]
Gather = Callable[..., Any]


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose config nests that of its language model."""
    return make_model("gemma3_vlm", tmp_path_factory.mktemp("vision") / "gemma3_vlm")


def report(folder: Path, spec: ConversionSpec, settings: Settings, workers: int = 1) -> PlanReport:
    outline = open_folder(folder).outline
    source = pin_source(str(folder), settings)
    memory = plan_memory(outline, spec, workers, cost_model("cpu"), None)
    return report_plan(source, name_releases(spec, source), outline, spec, workers, memory)


def test_the_cache_of_a_vision_model_is_its_language_model_s(
    vision: Path, llama: Path, make_spec: MakeSpec, settings: Settings
) -> None:
    spec = make_spec(variants=["gptq-w4-g64"])
    plan = report(vision, spec, settings)
    # 2 (keys, values) x 2 bytes x 2 layers x 2 heads x 32 dimensions for each token.
    assert (plan.kv_cache_tokens, plan.kv_cache_bytes) == (8192, 8192 * 2 * 2 * 2 * 2 * 32)
    text = report(llama, spec, settings)
    assert (text.kv_cache_tokens, text.kv_cache_bytes) == (2048, 2048 * 2 * 2 * 2 * 2 * 32)


def test_a_report_adds_up(llama: Path, make_spec: MakeSpec, settings: Settings) -> None:
    one = report(llama, make_spec(), settings)
    assert one.num_parameters == sum(
        entry.num_elements for _, entry in open_folder(llama).outline.index.entries.values()
    )
    assert (one.calibration_tokens, one.heldout_tokens) == (6 * 32, 2 * 32)
    assert report(llama, make_spec(), settings, workers=4).seconds < one.seconds
    for variant in one.variants:
        saved = sum(row.bytes_in - row.bytes_out for row in variant.matrices)
        assert variant.size_bytes == one.size_bytes - saved < one.size_bytes
        assert (variant.num_quantized, variant.num_linears) == (14, 14)
        assert all(variant.fits.values())


def test_solves_follow_the_formulas(llama: Path, make_spec: MakeSpec, settings: Settings) -> None:
    gptq, awq, rtn = report(llama, make_spec(variants=["gptq-w4-g64", "awq-w4-g64", "rtn-w8-g64"]), settings).variants
    shapes = [shape_of(group) for block in open_folder(llama).outline.groups for group in block]
    columns = sum(2.0 * shape.rows * shape.width**2 for shape in shapes)
    assert rtn.solve_flops == pytest.approx(columns, rel=1e-12)
    assert gptq.solve_flops == pytest.approx(columns + sum(shape.width**3 / 3 for shape in shapes), rel=1e-12)
    assert awq.solve_flops > gptq.solve_flops


def test_unquantized_linears_weigh_what_they_did_and_cost_nothing(
    llama: Path, make_spec: MakeSpec, settings: Settings
) -> None:
    ignoring = {"name": "some", "method": "gptq", "group_size": 64, "ignore": ["re:down_proj$"]}
    every = {**ignoring, "name": "every", "ignore": []}
    some, all_ = report(llama, make_spec(variants=[ignoring, every]), settings).variants
    assert (some.num_quantized, all_.num_quantized) == (12, 14)
    assert some.solve_flops < all_.solve_flops
    assert some.notes == {"left unquantized: the spec ignores it": 2}
    kept = [row for row in some.matrices if row.name.endswith("down_proj")]
    assert [(row.bits, row.group_size, row.bytes_in) for row in kept] == [(16, 0, row.bytes_out) for row in kept]


@pytest.mark.parametrize("pattern", ["re:fc1$", "re:[qkv]_proj$"])
def test_part_of_a_group_is_left_out_unless_its_input_would_be_scaled(
    pattern: str, make_spec: MakeSpec, tmp_path: Path
) -> None:
    outline = open_folder(make_model("phi", tmp_path / "phi")).outline
    gptq = {"name": "some", "method": "gptq", "group_size": 64, "ignore": [pattern]}
    plan = make_variant_plan(make_spec(variants=[gptq]).variants[0], outline)
    parts = {position: part.label for position, part, _ in quantized_groups(outline.groups[0], plan.matrices)}
    assert parts[0] == ("q_proj+k_proj+v_proj" if "fc1" in pattern else "fc1")
    with pytest.raises(PlanError, match="cannot stay unquantized alone") as caught:
        make_variant_plan(make_spec(variants=[{**gptq, "method": "awq", "symmetric": False}]).variants[0], outline)
    assert caught.value.code == "plan.group"


def test_codes_that_no_kernel_takes_are_noted(llama: Path, make_spec: MakeSpec, settings: Settings) -> None:
    (plan,) = report(llama, make_spec(variants=["awq-w8-g64"]), settings).variants
    assert [(count, "zero points with 4-bit codes only" in note) for note, count in plan.notes.items()] == [(14, True)]


def test_what_vllm_does_not_load_is_said_once(llama: Path, make_spec: MakeSpec, settings: Settings) -> None:
    (plan,) = report(llama, make_spec(variants=["gptq-w3-g64"]), settings).variants
    assert plan.notes == {}
    assert [limit.loads for limit in plan.limits] == [False]
    packed = 3 / 16 + (16 + 3) / 16 / 64
    rows = [row for row in plan.matrices if row.group_size]
    assert {row.bytes_out - 4 * row.in_features for row in rows} == {round(packed * row.bytes_in) for row in rows}


@pytest.mark.parametrize(
    ("model", "key", "changes"),
    [
        ("gpt2", "n_positions", {"n_positions": 64}),
        ("llama", "max_position_embeddings", {"max_position_embeddings": 64}),
    ],
)
def test_sequences_longer_than_the_positions_are_refused(
    model: str, key: str, changes: dict[str, int], make_spec: MakeSpec, settings: Settings, tmp_path: Path
) -> None:
    folder = make_model(model, tmp_path / model, **changes)
    common: dict[str, Any] = {"source": str(folder), "variants": ["gptq-w4-g64"]}
    plan_conversion(make_spec(**common, calibration={"length": 64}, gates={"heldout_length": 64}), settings, 1)
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"calibration": {"length": 65}}, "calibration.length is 65", "--length 64"),
        ({"gates": {"heldout_length": 65}}, "gates.heldout_length is 65", "--heldout-length 64"),
        ({"gates": {"generated_tokens": 64}}, "gates.generated_tokens is 65", "generated_tokens: 63"),
    ]
    for change, words, remedy in cases:
        with pytest.raises(PlanError) as caught:
            plan_conversion(make_spec(**common, **change), settings, 1)
        assert caught.value.code == "plan.positions"
        assert f"the model's 64 positions ({key} in config.json): " in caught.value.message
        assert caught.value.message.endswith(words)
        assert remedy in caught.value.hint


def test_prompts_count_by_their_tokens_where_the_tokenizer_is_at_hand(make_spec: MakeSpec, tmp_path: Path) -> None:
    outline = open_folder(make_model("llama", tmp_path / "llama", max_position_embeddings=64)).outline
    spec = make_spec(gates={"prompts": [{"prompt": "one two"}, {"prompt": "one two three"}], "generated_tokens": 61})
    require_positions(spec, outline, lambda prompt: len(prompt.split()))
    with pytest.raises(PlanError, match=r"gates\.generated_tokens is 65"):
        require_positions(spec, outline, lambda prompt: 1 + len(prompt.split()))
