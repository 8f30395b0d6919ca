"""The plan says what loaders cannot do with a variant, as the card of its release will."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli.plan import plan_command
from pipeline.formats.loaders import Contents, Loader, limits
from pipeline.graph.plan import plan_conversion
from pipeline.settings import load_settings
from pipeline.spec import build_spec
from tests.architectures import make_model
from tests.factories import make_facts, make_module


def planned(source: Path, variant: str) -> list[str]:
    """Return the limits of a planned variant."""
    spec = build_spec({"source": str(source), "variants": [variant], "targets": ["nowhere"]}, "test")
    (report,) = plan_conversion(spec, load_settings(), 1)[0].variants
    return [limit.text for limit in report.limits]


@pytest.mark.parametrize(
    ("architecture", "name", "variant", "count"),
    [
        ("GPT2LMHeadModel", "gpt2", "gptq-w4-g64", 1),
        ("GPTNeoXForCausalLM", "gpt_neox", "awq-w4-g64", 1),
        ("GPTNeoXForCausalLM", "gpt_neox", "rtn-w8-channel-asym", 2),
        ("LlamaForCausalLM", "llama", "awq-w4-g64-ct", 0),
        ("LlamaForCausalLM", "llama", "gptq-w3-g64", 1),
    ],
)
def test_the_plan_and_the_release_have_the_same_limits(
    architecture: str, name: str, variant: str, count: int, tmp_path: Path
) -> None:
    source = make_model(name, tmp_path / name)
    spec = build_spec({"source": str(source), "variants": [variant], "targets": ["nowhere"]}, "test")
    (report,) = plan_conversion(spec, load_settings(), 1)[0].variants
    assert len(report.limits) == count
    modules = tuple(
        make_module(row.name, bits=row.bits, group_size=row.group_size, in_features=row.in_features)
        for row in report.matrices
    )
    facts = make_facts(variant, modules=modules)
    facts = facts.model_copy(update={"source": facts.source.model_copy(update={"architecture": architecture})})
    assert report.limits == limits(Contents.of_release(facts))


def test_an_asymmetric_file_gets_one_group_size_that_every_loader_reads(tmp_path: Path) -> None:
    # 64 divides the hidden size, 32 what o_proj reads, and neither what down_proj reads.
    heads = {"head_dim": 32, "num_attention_heads": 5, "num_key_value_heads": 5}
    source = make_model("qwen3", tmp_path / "qwen3", intermediate_size=272, **heads)
    spec = build_spec({"source": str(source), "variants": ["awq-w4-g64-ct"], "targets": ["nowhere"]}, "test")
    (report,) = plan_conversion(spec, load_settings(), 1)[0].variants
    assert {row.group_size for row in report.matrices} == {32, 0}
    assert report.limits == ()


def test_the_command_shows_limits_word_by_word(tmp_path: Path) -> None:
    source = make_model("gpt2", tmp_path / "gpt2")
    done = CliRunner().invoke(plan_command, [str(source), "--variant", "gptq-w4-g64"], catch_exceptions=False)
    assert done.exit_code == 0
    (limit,) = planned(source, "gptq-w4-g64")
    assert Loader.TRANSFORMERS in limit
    assert " ".join(limit.split()) in " ".join(done.output.split())
