"""Plans of mixtures of experts: schemes, units, memory and tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.graph.build import build_units, make_variant_plan
from pipeline.graph.chains import shape_of
from pipeline.graph.cost import cost_model, solve_bytes
from pipeline.graph.dag import Kind, reachable_units
from pipeline.graph.expert_facts import expert_cautions, expert_degradations, scaling_cautions
from pipeline.graph.expert_rows import fold_experts
from pipeline.graph.forecast import planned_inputs
from pipeline.graph.memory import worker_memory
from pipeline.graph.plan import MatrixRow
from pipeline.graph.shape import active_elements
from pipeline.graph.shapes import CONFIGS, ShapeOutline, named_shape
from pipeline.graph.tuning import Tuning
from pipeline.spec import CalibrationSpec, ConversionSpec, ExpertStatistics, VariantSpec, build_spec, parse_variant
from tests.factories import make_module

TINY = {
    **CONFIGS["deepseek-v3"],
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 192,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
}


ALONE = Tuning(1, 20.0)
"""How a job for one worker is cut."""


def spec(variant: str, **calibration: Any) -> ConversionSpec:
    given = {"samples": 8, "length": 64, **calibration}
    return build_spec({"source": "x", "variants": [variant], "targets": ["y"], "calibration": given}, "test")


def units(variant: str, experts: str = "all", tuning: Tuning = ALONE, **calibration: Any) -> list[Any]:
    own = spec(variant, experts=experts, **calibration)
    outline = ShapeOutline("tiny", TINY, ExpertStatistics(experts))
    job = build_units(planned_inputs(outline, own, "cpu"), tuning)
    found: dict[str, Any] = {}
    pending = [pack for v in job.variants.values() for pack in v.packs]
    while pending:
        unit = pending.pop()
        if unit.key not in found:
            found[unit.key] = unit
            pending.extend(unit.needs)
    return list(found.values())


def test_experts_of_one_block_are_quantized_alike_or_not_at_all() -> None:
    shape = ShapeOutline("tiny", TINY)
    # 192 columns of down hold no groups of 128: symmetric compressed-tensors files would have two sizes.
    plan = make_variant_plan(parse_variant("gptq-w4-g128-ct"), shape)
    experts = [matrix for matrix in plan.matrices.values() if matrix.linear.expert]
    assert {matrix.scheme and matrix.scheme.group_size for matrix in experts} == {64}
    entering = [matrix for matrix in experts if matrix.linear.local_name.endswith("gate_proj")]
    assert {matrix.note for matrix in entering} == {"group size 64: engines load all experts of a block with one"}
    assert plan.matrices["model.layers.1.self_attn.o_proj"].scheme == replace(experts[0].scheme, group_size=128)
    one = "model.layers.1.mlp.experts.2.up_proj"
    plan = make_variant_plan(VariantSpec(method="gptq", group_size=64, ignore=(one,)), shape)
    kept = [name for name, matrix in plan.matrices.items() if matrix.scheme is None]
    assert len(kept) == 3 * 4
    assert all(name.startswith("model.layers.1.mlp.experts.") for name in kept)
    assert plan.matrices["model.layers.1.mlp.experts.0.down_proj"].note == (
        "left unquantized with mlp.experts.2.up_proj, which engines fuse it with "
        "(left unquantized: the spec ignores it)"
    )


def test_routers_are_named_as_unquantized_in_every_configuration() -> None:
    for name, where in (("gptq-w4-g64", "dynamic"), ("awq-w4-g64", "modules_to_not_convert"), ("rtn-w8-g64", "ignore")):
        config = make_variant_plan(parse_variant(name), ShapeOutline("tiny", TINY)).quantization_config
        name = r"-:^model\.layers\.\d+\.mlp\.gate$" if where == "dynamic" else "model.layers.1.mlp.gate"
        assert name in config[where]


def test_all_experts_are_rows_of_one_solve_where_they_share_statistics() -> None:
    merges = [u for u in units("gptq-w4-g64") if u.kind is Kind.MERGE and u.block == 1]
    # Attention has four inputs, experts share one, and each has one of its own for down, the shared expert too.
    assert len(merges) == 4 + 1 + 4 + 1
    solves = [u for u in units("gptq-w4-g64") if u.kind is Kind.SOLVE and u.block == 1 and len(u.params["members"]) > 4]
    assert len({tuple(u.params["identities"]) for u in solves}) == 1
    assert len(solves[0].params["members"]) == 2 * 5
    routed = [u for u in units("gptq-w4-g64", "routed") if u.kind is Kind.MERGE and u.block == 1]
    assert len(routed) == 4 + 4 + 1 + 4 + 1


def solves_of(found: list[Any], block: int) -> list[Any]:
    """Return the solves of a block's experts."""
    own = [unit for unit in found if unit.kind is Kind.SOLVE and unit.block == block]
    return [unit for unit in own if any(".experts." in member for member in unit.params["members"])]


@pytest.mark.parametrize("variant", ["gptq-w4-g64", "awq-gptq-w4-g64", "gptq-w4-g64-ct-trueseq"])
def test_experts_with_statistics_of_their_own_are_solved_by_one_unit_of_each_worker(variant: str) -> None:
    mode = "all" if variant.endswith("trueseq") else "routed"
    alone = units(variant, mode, Tuning(2, 1e-9))
    for workers, at_least in ((1, 4), (2, 2), (4, 1)):
        together = units(variant, mode, Tuning(2, 20.0, workers=workers))
        sizes = {len(unit.params["groups"]) for unit in solves_of(together, 1) if len(unit.params["members"]) < 10}
        assert max(sizes) == at_least
        # Everybody is there once, and nobody who reads a solve knows what was solved with it.
        named = [
            [name for unit in solves_of(found, 1) for name in unit.params["members"]] for found in (alone, together)
        ]
        assert sorted(set(named[0])) == sorted(named[1])
        keys = [
            {unit.key for unit in found if unit.is_durable and unit.kind is not Kind.SOLVE}
            for found in (alone, together)
        ]
        assert keys[0] == keys[1]


def test_only_experts_that_are_alike_are_solved_together() -> None:
    groups = ShapeOutline("tiny", TINY, ExpertStatistics("routed")).groups
    for unit in units("gptq-w4-g64", "routed"):
        if unit.kind is Kind.SOLVE and len(unit.params["groups"]) > 1:
            own = [groups[unit.block][position] for position in unit.params["groups"]]
            assert len({(group.in_features, len(group.linears)) for group in own}) == 1
            assert all(group.expert for group in own)
            assert unit.params["rows"] == (0, sum(ln.out_features for group in own for ln in group.linears))
            assert unit.label.endswith(f" and {len(own) - 1} like it")


def test_experts_solved_together_take_in_no_more_than_the_largest_group() -> None:
    wide = {**TINY, "moe_intermediate_size": 512, "intermediate_size": 1024}
    own = spec("gptq-w4-g64", experts="routed")
    outline = ShapeOutline("tiny", wide, ExpertStatistics("routed"))
    job = build_units(planned_inputs(outline, own, "cpu"), ALONE)
    found = [unit for unit in reachable_units(job.goals) if unit.kind is Kind.SOLVE]
    groups = outline.groups
    largest = max(solve_bytes(shape_of(group)) for block in groups for group in block)
    for unit in found:
        own_bytes = sum(solve_bytes(shape_of(groups[unit.block][position])) for position in unit.params["groups"])
        assert own_bytes <= largest
    assert {len(unit.params["groups"]) for unit in found if unit.block == 1} == {1, 3, 4}


def test_a_solve_waits_for_no_scales_inside_another_expert() -> None:
    found = units("awq-w4-g64")
    groups = ShapeOutline("tiny", TINY).groups[1]
    for unit in found:
        if unit.kind is Kind.SOLVE and unit.block == 1:
            own = [linear for position in unit.params["groups"] for linear in groups[position].linears]
            read = [groups[need.params["group"]].expert for need in unit.needs if need.kind is Kind.SCALES]
            experts = {linear.expert for linear in own if linear.expert}
            assert {expert for expert in read if expert} == experts


def keys(kind: Kind, block: int, experts: str, **calibration: Any) -> set[str]:
    return {u.key for u in units("gptq-w4-g64", experts, **calibration) if u.kind is kind and u.block == block}


def test_what_experts_see_is_in_the_keys_of_what_depends_on_it_alone() -> None:
    # The first block has no experts; what leaves it is the same whatever they see.
    assert keys(Kind.MERGE, 0, "all") == keys(Kind.MERGE, 0, "routed") == keys(Kind.MERGE, 0, "shrinkage")
    assert not keys(Kind.MERGE, 1, "all") & keys(Kind.MERGE, 1, "routed")
    weak, strong = (keys(Kind.MERGE, 1, "shrinkage", expert_shrinkage=weight) for weight in (0.1, 0.5))
    # Only what is blended depends on the weight: four experts, two inputs each.
    assert len(weak - strong) == len(strong - weak) == 8
    assert keys(Kind.CALIBRATE, 2, "shrinkage", expert_shrinkage=0.1) == keys(
        Kind.CALIBRATE, 2, "shrinkage", expert_shrinkage=0.5
    )


def test_a_token_passes_the_experts_that_it_is_sent_to() -> None:
    shape = ShapeOutline("tiny", TINY)
    everything = [sum(map(shape.tensor_elements, shape.skeleton.block_tensors(block).values())) for block in range(3)]
    assert active_elements(shape, 0) == everything[0]
    assert active_elements(shape, 1) == everything[1] - 3 * 3 * 256 * 192
    # DeepSeek V3 is known to have 37 B active parameters, of which 0.9 B each are embedding and head.
    large = named_shape("deepseek-v3")
    active = sum(active_elements(large, block) for block in range(61)) + 2 * 129_280 * 7168
    assert 36.5e9 < active < 38.5e9
    assert active_elements(replace(shape, config={**TINY, "num_experts_per_tok": 0}), 1) == everything[1]


@pytest.mark.parametrize("variant", ["gptq-w4-g128", "awq-w4-g128"])
def test_a_worker_needs_memory_for_a_block_of_256_experts_and_little_more(variant: str) -> None:
    shape = named_shape("deepseek-v3")
    needed = worker_memory(shape, spec(variant), ALONE)
    block = 4 * max(sum(map(shape.tensor_elements, shape.skeleton.block_tensors(b).values())) for b in range(61))
    assert block < needed.total < 2.0 * block
    routed = named_shape("deepseek-v3", ExpertStatistics.ROUTED)
    more = worker_memory(routed, spec(variant, experts="routed"), ALONE)
    # Every expert then has a second moment of its own for gate and up.
    assert more.units["add up statistics"] - needed.units["add up statistics"] == 3 * 4 * 256 * 7168**2
    blended = named_shape("deepseek-v3", ExpertStatistics.SHRINKAGE)
    most = worker_memory(blended, spec(variant, experts="shrinkage"), ALONE)
    assert most.units["add up statistics"] - more.units["add up statistics"] == 3 * 4 * (7168**2 + 256 * 2048**2)


def test_calibration_on_routed_tokens_is_cheaper_to_pass() -> None:
    def seconds(experts: str) -> float:
        return sum(u.cost for u in units("gptq-w4-g64", experts, length=512) if u.kind is Kind.CALIBRATE)

    costs = cost_model("cpu")
    assert seconds("routed") != seconds("all")
    assert costs.forward_s(active_elements(ShapeOutline("tiny", TINY), 1), 1e6) < costs.forward_s(1e6, 1e6)


def test_tables_show_experts_that_are_alike_in_one_row() -> None:
    def row(name: str, group_size: int = 64) -> MatrixRow:
        return MatrixRow(name, 1, 192, 256, 4, group_size, "", 98_304, 30_000)

    rows = [row(f"model.layers.1.mlp.experts.{number}.{part}") for number in range(4) for part in ("gate_proj", "w2")]
    rows += [row("model.layers.1.mlp.experts.4.w2", group_size=32), row("model.layers.1.self_attn.o_proj")]
    folded = [(item.name, count, item.bytes_in, item.group_size) for item, count in fold_experts(rows)]
    assert folded == [
        ("model.layers.1.mlp.experts.*.gate_proj", 4, 4 * 98_304, 64),
        ("model.layers.1.mlp.experts.*.w2", 4, 4 * 98_304, 64),
        ("model.layers.1.mlp.experts.4.w2", 1, 98_304, 32),
        ("model.layers.1.self_attn.o_proj", 1, 98_304, 64),
    ]


def test_few_tokens_are_a_degradation_only_where_statistics_are_of_them() -> None:
    def found(tokens: int | None, experts: str) -> tuple[str, ...]:
        return expert_degradations(tokens, CalibrationSpec(experts=experts, min_expert_tokens=10))

    for mode in ExpertStatistics:
        assert found(None, mode) == found(10, mode) == ()
    assert found(0, "all") == found(9, "all") == ()
    few = ("the router sent 9 calibration tokens to this expert, 10 are asked for",)
    assert found(9, "routed") == found(9, "shrinkage") == few
    assert "rounded to nearest" in found(0, "routed")[0]
    assert "statistics are those of all tokens" in found(0, "shrinkage")[0]


def test_cautions_count_what_they_are_of() -> None:
    modules = [make_module(expert_tokens=count, in_features=100) for count in (0, 99, 100)] + [make_module()]
    (caution,) = expert_cautions(modules, CalibrationSpec(experts="routed"))
    assert caution.startswith("2 linears of experts were calibrated on fewer tokens than they have inputs")
    assert expert_cautions(modules, CalibrationSpec()) == ()
    awq = [make_module(awq_exponent=0.5), make_module(), make_module(bits=16, group_size=0)]
    (caution,) = scaling_cautions(awq, parse_variant("awq-w4-g128"))
    assert caution.startswith("1 of 2 linears have no activation-aware scales")
    assert scaling_cautions(awq[:1], parse_variant("awq-w4-g128")) == ()
    assert scaling_cautions(awq, parse_variant("gptq-w4-g128")) == ()
