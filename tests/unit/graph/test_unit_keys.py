"""Keys of work units: what changes bytes changes them, and nothing else does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import CalibrationError
from pipeline.graph import build, stages
from pipeline.graph.build import Inputs, build_units
from pipeline.graph.dag import Kind, reachable_units
from pipeline.spec import ConversionSpec, parse_variant

MakeSpec = Callable[..., ConversionSpec]
Gather = Callable[..., Inputs]
UP = "model.layers.1.mlp.up_proj.weight"

Keys = dict[tuple[Kind, int, str, str], list[str]]


def keys(inputs: Inputs) -> Keys:
    """Return the keys of all units by kind, block, variant and label."""
    units = build_units(inputs)
    found: Keys = {}
    for unit in reachable_units(units.goals):
        found.setdefault((unit.kind, unit.block, unit.variant, unit.label), []).append(unit.key)
    return {place: sorted(own) for place, own in found.items()}


def changed(before: Keys, after: Keys) -> set[tuple[Kind, int, str]]:
    """Return kind, block and variant of the units whose keys differ."""
    assert before.keys() == after.keys()
    return {place[:3] for place in before if not set(before[place]) & set(after[place])}


def every_unit(found: Keys) -> set[tuple[Kind, int, str]]:
    return {place[:3] for place in found}


def copy_changed(source: Path, folder: Path, tensor: str, both_blocks_in_one_file: bool = True) -> Path:
    """Return a copy of a source whose blocks lie in a file each, one value of ``tensor`` changed."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if tensor:
        tensors[tensor][0, 0] += 1
    if both_blocks_in_one_file:
        save_file(tensors, path, {"format": "pt"})
        return folder
    path.unlink()
    weight_map = {name: "last.safetensors" if ".layers.1." in name else "first.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_all_keys_differ_from_each_other(make_spec: MakeSpec, gather: Gather) -> None:
    units = reachable_units(build_units(gather(make_spec())).goals)
    assert len({unit.key for unit in units}) == len(units)
    # 2 slices x (embed + 2 blocks), 2 merges, held-out 1 x 3, outer, source generation; per variant 8 solves, 2 packs,
    # 1 evaluation, 1 generation; 8 scales for AWQ.
    assert len(units) == 6 + 2 + 3 + 2 + 2 * 12 + 8


def test_keys_do_not_know_paths_targets_names_or_costs(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(gather(make_spec()))
    moved = shutil.copytree(llama, tmp_path / "elsewhere" / "other-name")
    text = tmp_path / "same text elsewhere.txt"
    shutil.copyfile(tmp_path / "calibration.txt", text)
    monkeypatch.setattr(build, "_solve_flops", lambda group: 1.0)
    spec = make_spec(
        source=str(moved), targets=[str(tmp_path / "a")], release="team/name", calibration={"text": str(text)}
    )
    assert keys(gather(spec)) == before


def test_more_variants_change_no_key_of_the_others(make_spec: MakeSpec, gather: Gather) -> None:
    both = keys(gather(make_spec()))
    alone = keys(gather(make_spec(variants=["awq-w4-g64"])))
    assert alone == {place: own for place, own in both.items() if place[2] != "gptq-w4-g64"}


def test_budgets_change_no_key(make_spec: MakeSpec, gather: Gather) -> None:
    assert keys(gather(make_spec(gates={"max_kl": 9.0}))) == keys(gather(make_spec()))


def test_other_calibration_tokens_change_everything_that_saw_them(make_spec: MakeSpec, gather: Gather) -> None:
    before = keys(gather(make_spec()))
    after = keys(gather(make_spec(calibration={"length": 40})))
    untouched = {(Kind.OUTER, -1, ""), (Kind.GENERATE, -1, "")}
    touched = changed(before, after)
    # Held-out slices share kind and block with the calibration's, so their places keep a key.
    assert every_unit(before) - touched == untouched | {
        (Kind.EMBED, -1, ""),
        *((Kind.CALIBRATE, b, "") for b in (0, 1)),
    }


def test_slices_are_part_of_the_result(make_spec: MakeSpec, gather: Gather) -> None:
    before = keys(gather(make_spec()))
    after = keys(gather(make_spec(calibration={"slice_sequences": 3})))
    assert {(Kind.MERGE, 0, ""), (Kind.PACK, 1, "gptq-w4-g64")} <= changed(before, after)


def test_a_solver_option_changes_its_variant_only(make_spec: MakeSpec, gather: Gather) -> None:
    before = keys(gather(make_spec()))
    damped = parse_variant("gptq-w4-g64").model_copy(update={"damping": 0.05})
    after = keys(gather(make_spec(variants=[damped.model_dump(), "awq-w4-g64"])))
    own = {place for place in every_unit(before) if place[2] == "gptq-w4-g64"}
    assert changed(before, after) == own


def test_a_changed_weight_changes_its_block_and_what_follows(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path
) -> None:
    before = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "a", "", False)))))
    after = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "b", UP, False)))))
    first_block = {place for place in every_unit(before) if place[1] == 0}
    assert every_unit(before) - changed(before, after) == first_block | {(Kind.EMBED, -1, ""), (Kind.OUTER, -1, "")}


def test_a_weight_in_the_only_file_changes_everything(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path
) -> None:
    before = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "a", "")))))
    after = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "b", UP)))))
    assert changed(before, after) == every_unit(before)


def test_config_device_and_algorithm_version_change_everything(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(gather(make_spec()))
    folder = shutil.copytree(llama, tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert changed(before, keys(gather(make_spec(source=str(folder))))) == every_unit(before)
    assert changed(before, keys(gather(make_spec(), "cuda"))) == every_unit(before)
    versions = {**stages.ALGORITHM_VERSIONS, Kind.SCALES: 2}
    monkeypatch.setattr(build, "ALGORITHM_VERSIONS", versions)
    own = {place for place in every_unit(before) if place[2] == "awq-w4-g64"}
    assert changed(before, keys(gather(make_spec()))) == own


def test_held_out_tokens_of_the_same_text_follow_the_calibration_s(
    make_spec: MakeSpec, gather: Gather, tmp_path: Path
) -> None:
    whole = gather(make_spec(calibration={"samples": 8})).calibration.tokens_NL
    inputs = gather(make_spec(gates={"heldout": str(tmp_path / "calibration.txt")}))
    assert torch.equal(inputs.calibration.tokens_NL, whole[:6])
    assert torch.equal(inputs.heldout.tokens_NL, whole[6:])


def test_held_out_text_too_short_for_both_says_what_was_taken(
    make_spec: MakeSpec, gather: Gather, tmp_path: Path
) -> None:
    shared = {"heldout": str(tmp_path / "calibration.txt"), "heldout_samples": 10_000}
    with pytest.raises(CalibrationError, match=r"10000 x 32 are needed after the first 192"):
        gather(make_spec(gates=shared))
