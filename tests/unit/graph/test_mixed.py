"""Mixed precision: which linears share a width, and what budgets buy."""

from __future__ import annotations

import pytest

from pipeline.errors import PlanError
from pipeline.graph.mixed import Damages, allocated_widths, candidates, packed_bytes
from pipeline.graph.schemes import loaded_together, plan_matrices
from pipeline.graph.shapes import ShapeOutline, named_shape
from pipeline.skeleton.groups import LinearGroup, LinearRef
from pipeline.spec import VariantSpec, parse_variant
from tests.unit.graph.test_mixture_plans import TINY

SHAPE = ShapeOutline(
    "small",
    {
        "num_hidden_layers": 3,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
)


def damages_of(plans: dict[int, dict[str, object]], worst: str, factor: float) -> Damages:
    """Return damages that quarter with every bit, those of linears with ``worst`` in their name so many times as
    large."""
    return {
        bits: {name: 4.0**-bits * (factor if worst in name else 1.0) for name in plan} for bits, plan in plans.items()
    }


def weights(name: str) -> int:
    return SHAPE.tensor_elements(f"{name}.weight")


def average(widths: dict[str, int]) -> float:
    return sum(bits * weights(name) for name, bits in widths.items()) / sum(map(weights, widths))


@pytest.mark.parametrize("bits", [3.0, 3.5, 4.0, 4.25, 5.7, 8.0])
def test_the_average_is_kept_and_used(bits: float) -> None:
    variant = parse_variant(f"gptq-w{bits}-g64")
    plans = candidates(variant, SHAPE)
    widths = allocated_widths(variant, SHAPE, plans, damages_of(plans, "down_proj", 50.0))
    assert bits - 0.2 < average(widths) <= bits
    assert set(widths.values()) <= set(variant.choices)


def test_bits_go_where_damage_is() -> None:
    variant = parse_variant("gptq-w4.0-g64")
    plans = candidates(variant, SHAPE)
    widths = allocated_widths(variant, SHAPE, plans, damages_of(plans, "layers.1.mlp.down_proj", 1000.0))
    assert widths["model.layers.1.mlp.down_proj"] == max(widths.values()) > 4
    assert min(widths.values()) == 3


def test_without_measurements_all_weights_count_the_same() -> None:
    variant = parse_variant("gptq-w4.0-g64")
    assert set(allocated_widths(variant, SHAPE, candidates(variant, SHAPE)).values()) == {4}


def test_what_engines_load_as_one_has_one_width() -> None:
    variant = parse_variant("gptq-w4.25-g64")
    plans = candidates(variant, SHAPE)
    widths = allocated_widths(variant, SHAPE, plans, damages_of(plans, "k_proj", 100.0))
    for together in loaded_together(group for block in SHAPE.groups for group in block):
        assert len({widths[name] for name in together}) == 1
    plan_matrices(variant, SHAPE.groups, widths)


def test_all_experts_of_a_block_have_one_width() -> None:
    shape = ShapeOutline("tiny", TINY)
    together = loaded_together(group for block in shape.groups for group in block)
    assert len({name for names in together for name in names}) == sum(map(len, together))
    for names in together:
        blocks = {name.split(".")[2] for name in names if ".experts." in name}
        assert len(blocks) <= 1
    experts = [names for names in together if any(".experts." in name for name in names)]
    assert len(experts) == len({names[0].split(".")[2] for names in experts})


def test_a_budget_of_bytes_is_kept_to_the_byte() -> None:
    for size in ("1.3MB", "1.5MB", "2MB"):
        variant = VariantSpec.model_validate({"method": "gptq", "group_size": 64, "mix": {"weights": size}})
        widths = allocated_widths(variant, SHAPE, candidates(variant, SHAPE))
        matrices = plan_matrices(variant, SHAPE.groups, widths)
        before = sum(SHAPE.tensor_bytes(f"{name}.weight") for name in matrices)
        taken = SHAPE.index.total_bytes - before + sum(packed_bytes(variant, plan, SHAPE) for plan in matrices.values())
        assert float(size[:-2]) * 1e6 - 40_000 < taken <= float(size[:-2]) * 1e6


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ({"average_bits": 2.5, "choices": [3, 4]}, r"mix.average_bits 2.5 is too little: with 3 bits .* takes 3.00"),
        ({"weights": "100kB"}, r"mix.weights 100kB is too little: with 3 bits .* takes [\d.]+ [kM]B"),
        ({"memory": "8GiB"}, "mix.memory needs a source"),
    ],
)
def test_a_budget_that_cannot_be_kept_says_what_could(mix: dict[str, object], said: str) -> None:
    variant = VariantSpec.model_validate({"method": "gptq", "group_size": 64, "mix": mix})
    with pytest.raises(PlanError, match=said) as caught:
        allocated_widths(variant, SHAPE, candidates(variant, SHAPE))
    assert caught.value.code == "plan.budget"


def test_a_whole_model_is_allocated_at_once() -> None:
    shape = named_shape("llama-3.1-70b")
    variant = parse_variant("gptq-w4.3-g128")
    widths = allocated_widths(variant, shape, candidates(variant, shape))
    sizes = {name: shape.tensor_elements(f"{name}.weight") for name in widths}
    mean = sum(bits * sizes[name] for name, bits in widths.items()) / sum(sizes.values())
    assert 4.28 < mean <= 4.3


def group(in_features: int, *members: tuple[str, int]) -> LinearGroup:
    return LinearGroup(
        0, tuple(LinearRef(name, f"layers.0.{name}", rows, in_features, False) for name, rows in members)
    )


MODEL = [[group(64, ("attn.q", 64), ("attn.k", 64)), group(128, ("mlp.down", 64))]]


def test_given_widths_replace_the_variant_s() -> None:
    variant = VariantSpec.model_validate({"method": "gptq", "group_size": 64, "widths": {"re:down$": 8, "re:.": 3}})
    plans = plan_matrices(variant, MODEL)
    assert [plan.scheme and plan.scheme.bits for plan in plans.values()] == [3, 3, 8]
    assert not any(plan.note for plan in plans.values())


def test_widths_that_split_what_is_loaded_as_one_are_refused() -> None:
    variant = VariantSpec.model_validate({"method": "gptq", "group_size": 64, "widths": {"layers.0.attn.q": 8}})
    with pytest.raises(PlanError, match=r"layers\.0\.attn\.q 8 bits and layers\.0\.attn\.k 4") as caught:
        plan_matrices(variant, MODEL)
    assert caught.value.code == "plan.widths"
