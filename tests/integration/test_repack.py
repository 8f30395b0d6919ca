"""Releases in other formats: the same codes, as a conversion to that format would have written them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.cli.repack import repack_command
from pipeline.errors import CorruptReleaseError, PlanError
from pipeline.graph import repack as module
from pipeline.graph.repack import repack
from pipeline.graph.verify import verify
from pipeline.settings import Settings
from pipeline.spec import Format
from pipeline.storage.directory import DirectoryStore
from pipeline.validate.release import read_facts
from tests.architectures import make_model
from tests.integration.test_architectures import Converted, convert_folder

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = [
    ("gptq-w4-g64", Format.COMPRESSED_TENSORS, "gptq-w4-g64-ct"),
    ("gptq-w4-g64-ct", Format.GPTQ, "gptq-w4-g64"),
    ("gptq-w4-g64", Format.GPTQ_V2, "gptq-w4-g64-gptq_v2"),
    ("awq-w4-g64", Format.COMPRESSED_TENSORS, "awq-w4-g64-ct"),
    ("awq-w4-g64-ct", Format.AWQ, "awq-w4-g64"),
]
"""A variant, a format, and the variant that a conversion would have made in it."""


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp(request.param)
    source = make_model(request.param, root / request.param)
    variants = dict.fromkeys([name for before, _, after in SAME for name in (before, after)])
    return convert_folder(source, root / "out", [*variants, "w8a8-int8"])


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plot_layer_error", "plot_size_quality"):
        monkeypatch.setattr(module, name, lambda facts: b"")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("http://127.0.0.1:9", None, tmp_path / "cache", s3_endpoint=None, ray_address=None)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize(("before", "format_", "after"), SAME)
def test_a_repacked_release_is_what_a_conversion_to_that_format_writes(
    before: str, format_: Format, after: str, converted: Converted, tmp_path: Path, settings: Settings
) -> None:
    source, lines = converted.folder(before), list[str]()
    store = DirectoryStore(tmp_path)
    found = repack(str(source), format_, [store], "", settings, lines.append)
    folder, direct = Path(found.locations[0]), converted.folder(after)
    ours, theirs = tensors_of(folder), tensors_of(direct)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert config_of(folder) == config_of(direct)
    old, new = read_facts(source), read_facts(folder)
    assert new.release == f"{old.release.removesuffix(before)}{after}"
    assert new.variant == read_facts(direct).variant
    assert new.repacked_from == f"{old.release}@{source.name}"
    assert (new.quality, new.modules, new.source) == (old.quality, old.modules, old.source)
    assert new.size_bytes == sum(tensor.nbytes for tensor in ours.values())
    assert before in [item.variant for item in new.siblings]
    assert verify(str(folder), None, settings, lines.append).passed
    assert f"These are the codes of `{new.repacked_from}`" in (folder / "README.md").read_text()
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    assert names == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    again = repack(str(source), format_, [store], "", settings, lines.append)
    assert again.locations == found.locations
    assert not list((settings.cache_dir / "repack").iterdir())


@pytest.mark.parametrize(
    ("variant", "format_", "reason"),
    [
        ("gptq-w4-g64", Format.GPTQ, "is in format gptq already"),
        ("gptq-w4-g64", Format.AWQ, "format awq stores zero points"),
        ("awq-w4-g64", Format.GPTQ, "format gptq holds symmetric grids only"),
        ("w8a8-int8", Format.GPTQ, "activations dynamic is for format compressed-tensors, not gptq"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(
    variant: str, format_: Format, reason: str, converted: Converted, tmp_path: Path, settings: Settings
) -> None:
    with pytest.raises(PlanError, match=reason) as caught:
        repack(str(converted.folder(variant)), format_, [DirectoryStore(tmp_path)], "", settings, lambda line: None)
    assert caught.value.code == "plan.repack"
    assert not (tmp_path / "releases").exists()


@pytest.mark.parametrize("converted", ["llama"], indirect=True)
def test_a_damaged_release_is_not_repacked(converted: Converted, tmp_path: Path, settings: Settings) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(converted.folder("gptq-w4-g64"), damaged)
    file = next(path for path in sorted(damaged.glob("*.safetensors")) if "down_proj" in str(list(load_file(path))))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("qweight"))
    tensors[name] ^= 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CorruptReleaseError, match="is damaged"):
        repack(str(damaged), Format.GPTQ_V2, [DirectoryStore(tmp_path)], "", settings, lambda line: None)
    assert not (tmp_path / "releases").exists()


@pytest.mark.parametrize("converted", ["llama"], indirect=True)
def test_the_command_publishes_under_another_name_and_says_where(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    words = [str(converted.folder("gptq-w4-g64")), "--format", "gptq_v2", "--to", str(tmp_path / "out")]
    shown = CliRunner().invoke(repack_command, [*words, "--release", "team/model-v2"])
    assert shown.exit_code == 0, shown.output
    location = Path(shown.stdout.splitlines()[-1])
    assert location.parent == tmp_path / "out" / "releases" / "team" / "model-v2"
    stated = json.loads(CliRunner().invoke(repack_command, [*words, "--release", "team/model-v2", "--json"]).stdout)
    assert stated["locations"] == [str(location)]
    assert stated["release"] == "team/model-v2"
