"""What ``verify`` finds in a published release without any engine: weights that mean something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.facts import Check, ReleaseFacts, Sample
from pipeline.graph import assemble
from pipeline.graph.convert import RunOptions, convert
from pipeline.settings import Settings
from pipeline.spec import build_spec
from pipeline.validate.release import check_release, read_facts
from tests.acceptance.conftest import DEMO_MODEL
from tests.integration.test_architectures import NoSink

VARIANTS = {"gptq-w4-g128": "qweight", "awq-w4-g128": "qweight", "rtn-w8-g128": "weight_packed"}
FEW = {
    "calibration": {"samples": 8, "length": 64},
    "gates": {"heldout_samples": 2, "heldout_length": 64, "generated_tokens": 16},
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("releases")
    (root / "out").mkdir()
    settings = Settings("http://127.0.0.1:9", None, root / "cache", s3_endpoint=None, ray_address=None)
    spec = build_spec(
        {"source": str(DEMO_MODEL), "variants": list(VARIANTS), "targets": [str(root / "out")], **FEW}, "test"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "plot_layer_error", lambda facts: b"")
        patch.setattr(assemble, "plot_size_quality", lambda facts: b"")
        outcomes = convert(spec, settings, RunOptions(root / "work", workers=1, inline=True), NoSink())
    return {outcome.facts.variant.name: Path(outcome.locations[0]) for outcome in outcomes}


def generation(folder: Path, facts: ReleaseFacts) -> Check:
    checks = check_release(folder, facts, facts.generated_tokens)
    assert [check.name for check in checks] == ["structure", "scales", "generation"]
    assert all(check.passed for check in checks[:2])
    return checks[2]


def damaged(source: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Return a copy of a release with every tensor changed."""
    shutil.copytree(source, folder)
    for file in folder.glob("model-*.safetensors"):
        save_file({n: change(n, t) for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


def with_samples(facts: ReleaseFacts, *samples: Sample) -> ReleaseFacts:
    return facts.model_copy(update={"verdict": facts.verdict.model_copy(update={"samples": samples})})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_release_chooses_its_recorded_tokens(variant: str, releases: dict[str, Path]) -> None:
    facts = read_facts(releases[variant])
    assert all(1 <= len(sample.ids) <= 16 for sample in facts.verdict.samples)
    check = generation(releases[variant], facts)
    assert check.passed, check.detail
    judged = sum(len(sample.ids) + (len(sample.ids) < 16) for sample in facts.verdict.samples)
    assert f"{judged} of {judged} greedy tokens as the reference" in check.detail


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_that_mean_something_else_are_found(variant: str, releases: dict[str, Path], tmp_path: Path) -> None:
    def scramble(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor ^ 0x55555555 if name.endswith(VARIANTS[variant]) else tensor

    check = generation(damaged(releases[variant], tmp_path / "copy", scramble), read_facts(releases[variant]))
    assert not check.passed
    assert "The people of the United States" in check.detail


def test_weights_outside_the_blocks_that_mean_something_else_are_found(
    releases: dict[str, Path], tmp_path: Path
) -> None:
    def roll(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.roll(1, 0).contiguous() if "embed_tokens" in name else tensor

    folder = damaged(releases["gptq-w4-g128"], tmp_path / "copy", roll)
    assert not generation(folder, read_facts(folder)).passed


def test_other_tokens_an_end_that_was_none_and_no_samples_are_found(releases: dict[str, Path]) -> None:
    folder = releases["gptq-w4-g128"]
    facts = read_facts(folder)
    first, *others = facts.verdict.samples
    for ids in (first.ids[:-1], (*first.ids[:-1], first.ids[-1] ^ 1), (*first.ids[:-1], 10**6), (-1,) * 16, ()):
        check = generation(folder, with_samples(facts, first.model_copy(update={"ids": ids}), *others))
        assert not check.passed, ids
        assert first.prompt in check.detail
    assert not generation(folder, with_samples(facts)).passed
