"""A new release of a model: what did not change is not computed again, and the bytes are those of a fresh start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipeline.graph.convert import RunOptions, convert
from pipeline.observe.events import Event, Phase, StageFinished
from pipeline.settings import Settings
from pipeline.spec import build_spec
from tests.architectures import make_model

SENTENCES = [f"In the year {year} the ship left the harbour with {year % 97} men.\n" for year in range(1500, 1800)]
VARIANTS = ("gptq-w4-g64", "awq-w4-g64")
HEAD, BLOCK_1 = "head.safetensors", "block-1.safetensors"


class Stages:
    """An event sink that keeps what finished."""

    def __init__(self) -> None:
        self.finished: list[StageFinished] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, StageFinished):
            self.finished.append(event)

    def close(self) -> None:
        """Nothing is held."""

    def computed(self) -> set[tuple[Phase, int | None]]:
        """Return phase and block of what was not reused."""
        return {(stage.phase, stage.block) for stage in self.finished if not stage.reused}

    def reused(self) -> set[tuple[Phase, int | None]]:
        """Return phase and block of what was reused."""
        return {(stage.phase, stage.block) for stage in self.finished if stage.reused}


def file_of(tensor: str) -> str:
    if ".layers.1." in tensor:
        return BLOCK_1
    return "first.safetensors" if "embed" in tensor or ".layers.0." in tensor else HEAD


def make_release(folder: Path) -> Path:
    """Write a Llama in three files: embedding and first block, second block, final norm and head."""
    make_model("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: file_of(name) for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def next_release(before: Path, folder: Path, file: str, **config: Any) -> Path:
    """Copy a release with every matrix of one file changed, and values of config.json."""
    shutil.copytree(before, folder)
    tensors = {name: t * 1.125 if t.dim() > 1 else t for name, t in load_file(folder / file).items()}
    save_file(tensors, folder / file, {"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def run(source: Path, folder: Path, work: Path) -> tuple[Stages, dict[str, bytes]]:
    """Convert in this process; return what happened, and what was published."""
    for name, lines in {"calibration": SENTENCES[:200], "heldout": SENTENCES[200:]}.items():
        (folder / f"{name}.txt").write_text("".join(lines))
    target = folder / f"out-{source.parent.name}-{work.name}"
    target.mkdir()
    settings = Settings("http://127.0.0.1:9", None, folder / "cache", s3_endpoint=None, ray_address=None)
    spec = build_spec(
        {
            "source": str(source),
            "variants": list(VARIANTS),
            "targets": [str(target)],
            "calibration": {"text": str(folder / "calibration.txt"), "samples": 4, "length": 32, "slice_sequences": 2},
            "gates": {
                "heldout": str(folder / "heldout.txt"),
                "heldout_samples": 2,
                "heldout_length": 32,
                "generated_tokens": 8,
                **{f"max_{name}": None for name in ("relative_error", "kl", "perplexity_ratio", "degradations")},
            },
        },
        "test",
    )
    stages = Stages()
    outcomes = convert(spec, settings, RunOptions(work, 1, inline=True), stages)
    assert all(outcome.locations for outcome in outcomes)
    releases = target / "releases"
    files = {p.relative_to(releases).as_posix(): p.read_bytes() for p in sorted(releases.rglob("*")) if p.is_file()}
    return stages, files


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first release, converted in the work directory ``work``."""
    folder = make_release(tmp_path / "1" / "tiny")
    run(folder, tmp_path, tmp_path / "work")
    return folder


def test_another_head_and_another_writer_leave_only_what_reads_the_head_to_do(first: Path, tmp_path: Path) -> None:
    second = next_release(first, tmp_path / "2" / "tiny", HEAD, transformers_version="9.9.9")
    stages, files = run(second, tmp_path, tmp_path / "work")
    # The copy of what lies outside the blocks, scores and continuations. Held-out text went through the source before;
    # it is embedded for the variants, whose hidden states nobody keeps.
    assert stages.computed() == {
        (Phase.PACK, None),
        (Phase.CALIBRATE, None),
        *((Phase.EVALUATE, block) for block in (None, 0, 1)),
    }
    assert sum(s.phase is Phase.CALIBRATE and not s.reused for s in stages.finished) == 1
    forwards = [s for s in stages.finished if s.phase is Phase.EVALUATE and s.block is not None]
    assert {stage.variant for stage in forwards} == set(VARIANTS)
    assert stages.reused() == {(p, b) for p in (Phase.CALIBRATE, Phase.SOLVE, Phase.PACK) for b in (0, 1)}
    _, fresh = run(second, tmp_path, tmp_path / "empty")
    assert files == fresh


def test_another_block_leaves_the_blocks_before_it_as_they_are(first: Path, tmp_path: Path) -> None:
    second = next_release(first, tmp_path / "2" / "tiny", BLOCK_1)
    stages, files = run(second, tmp_path, tmp_path / "work")
    kept = {(p, 0) for p in (Phase.CALIBRATE, Phase.SOLVE, Phase.PACK)}
    assert stages.reused() == kept | {(Phase.PACK, None)}
    solved = {place for place in stages.computed() if place[0] in (Phase.SOLVE, Phase.PACK)}
    assert solved == {(Phase.SOLVE, 1), (Phase.PACK, 1)}
    _, fresh = run(second, tmp_path, tmp_path / "empty")
    assert files == fresh
