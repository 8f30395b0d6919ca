"""Keys of work units: what changes bytes changes them, and nothing else does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import CalibrationError
from pipeline.graph import build, identity
from pipeline.graph.build import Inputs, JobUnits, build_units
from pipeline.graph.chains import HALVES
from pipeline.graph.cost import CPU_RATES, CostModel
from pipeline.graph.dag import Kind, WorkUnit, reachable_units
from pipeline.graph.identity import IGNORED_CONFIG_KEYS, computing_config
from pipeline.graph.stages import ALGORITHM_VERSIONS
from pipeline.graph.tuning import Tuning
from pipeline.quantize.solve import TILE_ROWS
from pipeline.spec import ConversionSpec, parse_variant

MakeSpec = Callable[..., ConversionSpec]
Gather = Callable[..., Inputs]
UP = "model.layers.1.mlp.up_proj.weight"
TUNING = Tuning(spans=2, solve_s=20.0, heldout_spans=2, workers=2)
GPTQ, AWQ = "gptq-w4-g64", "awq-w4-g64"
SEQUENTIAL = "gptq-w4-g64-seq"
IN_TURN = "gptq-w4-g64-trueseq"
PASSING = {
    Kind.EMBED,
    Kind.CALIBRATE,
    Kind.COMPARE,
    Kind.PROPAGATE,
    Kind.ADD,
    Kind.COMPENSATE,
    Kind.FACTOR,
    Kind.FORWARD,
    Kind.CONTINUE,
}
ABSENT = {Kind.COMPARE, Kind.PROPAGATE, Kind.ADD, Kind.COMPENSATE, Kind.CONTINUE}
"""What is passed on in jobs of other variants, with more workers, and for larger models."""
Place = tuple[Kind, int, str]
Keys = dict[tuple[Kind, int, str, str], list[str]]


def every(inputs: Inputs, tuning: Tuning = TUNING) -> list[WorkUnit]:
    return reachable_units(build_units(inputs, tuning).goals)


def keys(inputs: Inputs, tuning: Tuning = TUNING) -> Keys:
    """Return the keys of all units by kind, block, variant and label (for what has none, its chain)."""
    found: Keys = {}
    for unit in every(inputs, tuning):
        place = (unit.kind, unit.block, unit.variant, unit.label or unit.home.partition(":")[0])
        found.setdefault(place, []).append(unit.key)
    return {place: sorted(own) for place, own in found.items()}


def changed(before: Keys, after: Keys) -> set[Place]:
    """Return kind, block and variant of the units whose keys differ."""
    assert before.keys() == after.keys()
    return {place[:3] for place in before if not set(before[place]) & set(after[place])}


def places(found: Keys, accept: Callable[[Place], bool] = lambda place: True) -> set[Place]:
    return {place[:3] for place in found if accept(place[:3])}


def copy_changed(source: Path, folder: Path, tensor: str, both_blocks_in_one_file: bool = True) -> Path:
    """Return a copy of a source whose second block, and what follows the blocks, lie in a file each, one value of
    ``tensor`` changed."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if tensor:
        tensors[tensor].view(-1)[0] += 1
    if both_blocks_in_one_file:
        save_file(tensors, path, {"format": "pt"})
        return folder
    path.unlink()
    files = {".layers.1.": "second.safetensors", "model.norm": "last.safetensors", "lm_head": "last.safetensors"}
    weight_map = {
        name: next((file for part, file in files.items() if part in name), "first.safetensors") for name in tensors
    }
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_all_keys_differ_from_each_other(make_spec: MakeSpec, gather: Gather) -> None:
    units = every(gather(make_spec()))
    assert len({unit.key for unit in units}) == len(units)
    counts = {kind: sum(unit.kind is kind for unit in units) for kind in Kind}
    # Two calibration spans and one of held-out text, two blocks of four groups, two variants.
    assert counts == {
        Kind.EMBED: 2 + 1,
        Kind.CALIBRATE: 2 * 2,
        Kind.COMPARE: 0,
        Kind.PROPAGATE: 0,
        Kind.ADD: 0,
        Kind.MERGE: 8,
        Kind.COMPENSATE: 0,
        Kind.FACTOR: 8,
        Kind.SENSE: 0,
        Kind.APPRAISE: 0,
        Kind.SCALES: 8,
        Kind.SOLVE: 2 * 8,
        Kind.PACK: 2 * 2,
        Kind.OUTER: 1,
        Kind.FORWARD: 2 + 2 * 2,
        Kind.SCORE: 2,
        Kind.CONTINUE: 0,
        Kind.GENERATE: 1 + 2,
        Kind.VERIFY: 0,
    }


def test_what_others_can_use_again_is_durable(make_spec: MakeSpec, gather: Gather) -> None:
    units = every(gather(make_spec()))
    assert {unit.kind for unit in units if not unit.is_durable} == PASSING - ABSENT
    # Files are only verified at the end where weights were streamed.
    # Nothing is appraised without mixed precision.
    absent = {Kind.SENSE, Kind.APPRAISE, Kind.VERIFY}
    assert {unit.kind for unit in units if unit.is_durable} == set(Kind) - PASSING - absent


def test_keys_do_not_know_paths_targets_names_or_costs(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(gather(make_spec()))
    moved = shutil.copytree(llama, tmp_path / "elsewhere" / "other-name")
    text = tmp_path / "same text elsewhere.txt"
    shutil.copyfile(tmp_path / "calibration.txt", text)
    slow = replace(CPU_RATES, forward_flops=1.0, column_flops=1.0, factor_flops=1.0, touched_bytes=1.0)
    monkeypatch.setattr(build, "cost_model", lambda *_: CostModel(slow, 1024))
    spec = make_spec(
        source=str(moved), targets=[str(tmp_path / "a")], release="team/name", calibration={"text": str(text)}
    )
    assert keys(gather(spec)) == before


def durable(units: Iterable[WorkUnit]) -> dict[str, WorkUnit]:
    return {unit.key: unit for unit in units if unit.is_durable}


@pytest.mark.parametrize("number", [1, 3, 8])
def test_spans_are_in_no_key_of_anything_stored(make_spec: MakeSpec, gather: Gather, number: int) -> None:
    inputs = gather(make_spec(calibration={"samples": 12, "slice_sequences": 2}, gates={"heldout_samples": 12}))
    two, many = every(inputs), every(inputs, Tuning(number, TUNING.solve_s, number, number))
    assert durable(two).keys() == durable(many).keys()
    assert {place for unit in two for place in unit.saves} == {place for unit in many for place in unit.saves}
    spans = [{unit.key for unit in units if unit.kind is Kind.CALIBRATE} for units in (two, many)]
    assert (spans[0] == spans[1]) == (number < HALVES)
    factors = [{unit.key for unit in units if unit.kind is Kind.FACTOR} for units in (two, many)]
    assert factors[0] == factors[1]


def test_a_solve_s_rows_are_in_its_own_key_and_in_no_other(
    make_spec: MakeSpec, gather: Gather, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range of rows is a piece of something: equal pieces have equal keys, and nobody downstream knows the pieces."""
    monkeypatch.setitem(TILE_ROWS, "cpu", 64)
    inputs = gather(make_spec())
    whole, halves, tiles = (every(inputs, replace(TUNING, solve_s=solve_s)) for solve_s in (20.0, 0.0065, 1e-9))

    def solves(units: Iterable[WorkUnit]) -> dict[tuple[Any, ...], str]:
        return {(*u.params["identities"], tuple(u.params["rows"])): u.key for u in units if u.kind is Kind.SOLVE}

    def rest(units: Iterable[WorkUnit]) -> set[str]:
        return {key for key, unit in durable(units).items() if unit.kind is not Kind.SOLVE}

    assert len(solves(whole)) < len(solves(halves)) < len(solves(tiles))
    assert rest(whole) == rest(halves) == rest(tiles)
    assert {identity for identity, _ in solves(whole)} == {identity for identity, _ in solves(tiles)}
    # Groups of one tile cannot be cut, so they are the same pieces in every cut.
    common = solves(whole).keys() & solves(tiles).keys()
    assert {place: solves(whole)[place] for place in common} == {place: solves(tiles)[place] for place in common}
    assert len(set(solves(whole).values()) | set(solves(halves).values()) | set(solves(tiles).values())) == len(
        solves(whole).keys() | solves(halves).keys() | solves(tiles).keys()
    )


def test_row_ranges_cover_a_group_once(make_spec: MakeSpec, gather: Gather, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILE_ROWS, "cpu", 64)
    inputs = gather(make_spec())
    by_identity: dict[str, list[WorkUnit]] = {}
    for unit in every(inputs, replace(TUNING, solve_s=0.01)):
        if unit.kind is Kind.SOLVE:
            by_identity.setdefault(unit.params["identities"][0], []).append(unit)
    for parts in by_identity.values():
        rows = sorted(tuple(part.params["rows"]) for part in parts)
        group = inputs.outline.groups[parts[0].block][parts[0].params["groups"][0]]
        assert rows[0][0] == 0
        assert [low for low, _ in rows[1:]] == [high for _, high in rows[:-1]]
        assert rows[-1][1] == sum(linear.out_features for linear in group.linears)
        assert all(low % 64 == 0 for low, _ in rows)


def test_more_variants_change_no_key_of_the_others(make_spec: MakeSpec, gather: Gather) -> None:
    both = keys(gather(make_spec()))
    alone = keys(gather(make_spec(variants=[AWQ])))
    # Factors belong to no variant, and AWQ needs none.
    kept = {place: own for place, own in both.items() if place[2] != GPTQ and place[0] is not Kind.FACTOR}
    assert alone == kept


def test_scaled_statistics_are_factored_for_themselves(make_spec: MakeSpec, gather: Gather) -> None:
    both = "awq-gptq-w4-g64"
    built = build_units(gather(make_spec(variants=[GPTQ, AWQ, both])), TUNING)
    units = reachable_units(built.goals)
    factors = [unit for unit in units if unit.kind is Kind.FACTOR]
    assert len(factors) == 2 * 8
    assert sum(unit.kind is Kind.SCALES for unit in units) == 8, "searched once for the same grid"
    for unit in factors:
        assert [need.kind for need in unit.needs] == [Kind.MERGE] + [Kind.SCALES] * (unit.variant == both)
        assert all(need.params["group"] == unit.params["group"] for need in unit.needs)
    identities = {
        variant: {
            identity
            for pack in own.packs
            for unit in pack.needs
            if unit.kind is Kind.SOLVE
            for identity in unit.params["identities"]
        }
        for variant, own in built.variants.items()
    }
    assert len(identities[both]) == 8
    assert not identities[both] & (identities[GPTQ] | identities[AWQ])


def test_a_block_is_calibrated_behind_the_variant_s_own(make_spec: MakeSpec, gather: Gather) -> None:
    """Of two blocks the first one has nothing quantized before it: it is shared, and its factor with it."""
    built = build_units(gather(make_spec(variants=[GPTQ, SEQUENTIAL])), TUNING)
    units, packs = reachable_units(built.goals), built.variants[SEQUENTIAL].packs
    assert [pack.key == other.key for pack, other in zip(packs, built.variants[GPTQ].packs, strict=True)] == [
        True,
        False,
    ]
    own = set(reachable_units(packs[1:]))
    assert packs[0] in own
    by_kind = {kind: [unit for unit in own if unit.kind is kind and unit.block == 1] for kind in Kind}
    assert {unit.variant for unit in by_kind[Kind.COMPARE]} == {SEQUENTIAL}
    assert not by_kind[Kind.CALIBRATE]
    assert len(by_kind[Kind.MERGE]) == len(by_kind[Kind.COMPENSATE]) == 4
    passed = [unit for unit in own if unit.kind is Kind.PROPAGATE]
    assert {unit.block for unit in passed} == {0}
    assert len(passed) == len(by_kind[Kind.COMPARE]) == TUNING.spans
    assert sum(unit.kind is Kind.MERGE for unit in units) == 3 * 4
    # What it stores on the way is of no use afterwards.
    assert {place for unit in passed for place in unit.saves} <= set(built.leftovers)


def test_a_linear_group_is_calibrated_behind_those_solved_before(make_spec: MakeSpec, gather: Gather) -> None:
    """Of two blocks of four groups the first group is shared; each other one is compared once for all spans."""
    built = build_units(gather(make_spec(variants=[GPTQ, IN_TURN])), TUNING)
    packs = built.variants[IN_TURN].packs
    units = [unit for unit in reachable_units(packs) if unit.variant == IN_TURN or unit.kind is Kind.MERGE]
    compared = {(unit.block, *unit.params["groups"]): unit for unit in units if unit.kind is Kind.COMPARE}
    assert sorted(compared) == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert sum(unit.kind is Kind.COMPARE for unit in units) == TUNING.spans * len(compared)
    for (block, group), unit in compared.items():
        behind = {need.params["groups"][0] for need in unit.needs if need.kind is Kind.SOLVE}
        assert {need.block for need in unit.needs if need.kind is Kind.SOLVE} <= {block}
        assert behind == set(range(group))
        # Only what the next block is compared with passes on, and the last block is the end.
        assert unit.params.get("is_end", False) is bool(behind)
    merged = {(unit.block, unit.params["group"]) for unit in units if unit.kind is Kind.MERGE}
    assert merged == {(block, group) for block in range(2) for group in range(4)}
    assert packs[0].key != built.variants[GPTQ].packs[0].key
    shared = {unit.key for unit in reachable_units(built.variants[GPTQ].packs) if unit.kind is Kind.SOLVE}
    solved = [unit for unit in units if unit.kind is Kind.SOLVE]
    assert {(unit.block, *unit.params["groups"]) for unit in solved if unit.key in shared} == {(0, 0)}


def test_linears_left_alone_are_not_waited_for(make_spec: MakeSpec, gather: Gather) -> None:
    """Steps without anything quantized are none; where a block has none at all, text passes it all the same."""
    plain = parse_variant(IN_TURN).model_dump()
    some = {**plain, "name": "some", "ignore": ["re:q_proj|k_proj|v_proj", "re:layers.0"]}
    built = build_units(gather(make_spec(variants=[some])), TUNING)
    units = reachable_units(built.goals)
    compared = [unit for unit in units if unit.kind is Kind.COMPARE and unit.params["low"] == 0]
    assert sorted((unit.block, unit.params["groups"]) for unit in compared) == [(1, [1]), (1, [2]), (1, [3])]
    assert [len(pack.needs) for pack in built.variants["some"].packs] == [0, 3]


def test_what_changes_a_block_changes_the_statistics_behind_it(make_spec: MakeSpec, gather: Gather) -> None:
    damped = parse_variant(SEQUENTIAL).model_copy(update={"damping": 0.05})
    before = keys(gather(make_spec(variants=[SEQUENTIAL])))
    after = keys(gather(make_spec(variants=[damped])))
    kinds = {
        (kind, block) for kind, block, _ in changed(before, after) if kind in (Kind.MERGE, Kind.CALIBRATE, Kind.COMPARE)
    }
    assert kinds == {(Kind.MERGE, 1), (Kind.COMPARE, 1)}


@pytest.mark.parametrize("number", [1, 3, 8])
@pytest.mark.parametrize("variant", [SEQUENTIAL, IN_TURN])
def test_spans_are_in_no_stored_key_behind_own_blocks(
    make_spec: MakeSpec, gather: Gather, variant: str, number: int
) -> None:
    calibration = {"samples": 12, "slice_sequences": 2}
    inputs = gather(make_spec(variants=[variant], calibration=calibration, gates={"heldout_samples": 12}))
    two, many = every(inputs), every(inputs, Tuning(number, TUNING.solve_s, number, number))
    assert durable(two).keys() == durable(many).keys()
    assert {place for unit in two for place in unit.saves} == {place for unit in many for place in unit.saves}


def test_variants_that_differ_in_the_grid_share_statistics_and_factors(make_spec: MakeSpec, gather: Gather) -> None:
    units = every(gather(make_spec(variants=[GPTQ, "gptq-w4-g64-ct-asym", "gptq-w8-g64"])))
    assert sum(unit.kind is Kind.MERGE for unit in units) == 8
    assert sum(unit.kind is Kind.FACTOR for unit in units) == 8
    assert sum(unit.kind is Kind.SOLVE for unit in units) == 3 * 8


def test_a_format_changes_packs_only(make_spec: MakeSpec, gather: Gather) -> None:
    symmetric = parse_variant(GPTQ).model_dump()
    both = [{**symmetric, "name": "a"}, {**symmetric, "name": "b", "format": "compressed-tensors"}]
    units = every(gather(make_spec(variants=both)))
    assert sum(unit.kind is Kind.SOLVE for unit in units) == 8
    assert sum(unit.kind is Kind.PACK for unit in units) == 2 * 2


def test_budgets_change_no_key(make_spec: MakeSpec, gather: Gather) -> None:
    assert keys(gather(make_spec(gates={"max_kl": 9.0}))) == keys(gather(make_spec()))


def test_prompts_change_continuations_only(make_spec: MakeSpec, gather: Gather) -> None:
    before = keys(gather(make_spec()))
    for gates in ({"generated_tokens": 9}, {"prompts": [{"prompt": "Once"}]}):
        touched = changed(before, keys(gather(make_spec(gates=gates))))
        assert touched == places(before, lambda place: place[0] is Kind.GENERATE)


def test_other_held_out_tokens_change_what_is_judged_by_them_only(make_spec: MakeSpec, gather: Gather) -> None:
    before = keys(gather(make_spec()))
    after = keys(gather(make_spec(gates={"heldout_length": 24})))
    touched = {place for place in before if before[place] != after[place]}
    assert {place[0] for place in touched} == {Kind.EMBED, Kind.FORWARD, Kind.SCORE}
    assert not any(place[3] == "calibration" for place in touched)


def test_other_calibration_tokens_change_everything_that_saw_them(make_spec: MakeSpec, gather: Gather) -> None:
    before = keys(gather(make_spec()))
    after = keys(gather(make_spec(calibration={"length": 40})))
    untouched = {place for place in before if before[place] == after[place]}
    assert untouched == {
        (Kind.OUTER, -1, "", ""),
        (Kind.GENERATE, -1, "", ""),
        (Kind.EMBED, -1, "", "held-out"),
        (Kind.FORWARD, 0, "", "held-out"),
        (Kind.FORWARD, 1, "", "held-out"),
    }


def test_slices_are_part_of_the_result(make_spec: MakeSpec, gather: Gather) -> None:
    before = keys(gather(make_spec()))
    after = keys(gather(make_spec(calibration={"slice_sequences": 1})))
    assert {(Kind.MERGE, 0, ""), (Kind.PACK, 1, GPTQ)} <= changed(before, after)


def test_a_solver_option_changes_its_variant_only(make_spec: MakeSpec, gather: Gather) -> None:
    before = keys(gather(make_spec()))
    damped = parse_variant(GPTQ).model_copy(update={"damping": 0.05})
    after = keys(gather(make_spec(variants=[damped.model_dump(), AWQ])))
    own = places(before, lambda place: place[2] == GPTQ or place[0] is Kind.FACTOR)
    assert changed(before, after) == own


def test_a_changed_weight_changes_its_block_and_what_follows(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path
) -> None:
    before = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "a", "", False)))))
    after = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "b", UP, False)))))
    first_block = places(before, lambda place: place[1] == 0)
    assert places(before) - changed(before, after) == first_block | {(Kind.EMBED, -1, ""), (Kind.OUTER, -1, "")}


@pytest.mark.parametrize("tensor", ["lm_head.weight", "model.norm.weight"])
def test_what_follows_the_blocks_changes_what_reads_it(
    tensor: str, make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path
) -> None:
    before = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "a", "", False)))))
    after = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "b", tensor, False)))))
    readers = {Kind.OUTER, Kind.SCORE, Kind.GENERATE}
    assert changed(before, after) == places(before, lambda place: place[0] in readers)


def test_the_embedding_changes_everything(make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path) -> None:
    before = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "a", "", False)))))
    embedding = "model.embed_tokens.weight"
    after = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "b", embedding, False)))))
    assert changed(before, after) == places(before)


def test_a_weight_in_the_only_file_changes_everything(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path
) -> None:
    before = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "a", "")))))
    after = keys(gather(make_spec(source=str(copy_changed(llama, tmp_path / "b", UP)))))
    assert changed(before, after) == places(before)


def test_config_device_and_package_versions_change_everything(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(gather(make_spec()))
    folder = shutil.copytree(llama, tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert changed(before, keys(gather(make_spec(source=str(folder))))) == places(before)
    assert changed(before, keys(gather(make_spec(), "cuda"))) == places(before)
    monkeypatch.setattr(identity, "version", lambda name: "99.0")
    assert changed(before, keys(gather(make_spec()))) == places(before)


def test_the_scheme_of_keys_is_in_every_key(
    make_spec: MakeSpec, gather: Gather, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(gather(make_spec()))
    monkeypatch.setattr(identity, "KEY_SCHEME", 99)
    assert changed(before, keys(gather(make_spec()))) == places(before)


@pytest.mark.parametrize("key", IGNORED_CONFIG_KEYS)
def test_what_is_ignored_of_the_config_changes_what_has_the_tokenizer_only(
    key: str, make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path
) -> None:
    found = []
    for value in ("1.0", "2.0"):
        folder = shutil.copytree(llama, tmp_path / value)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        found.append(keys(gather(make_spec(source=str(folder)))))
    assert changed(*found) == places(found[0], lambda place: place[0] is Kind.GENERATE)


def test_only_values_of_outermost_keys_are_ignored_of_a_config() -> None:
    config = {"model_type": "m", "transformers_version": "5", "text_config": {"transformers_version": "5"}}
    assert computing_config(config) == {**config, "transformers_version": None}
    assert computing_config({}) == {}


def test_how_a_config_is_written_changes_what_has_the_tokenizer_only(
    make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path
) -> None:
    before = keys(gather(make_spec()))
    folder = shutil.copytree(llama, tmp_path / "b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    after = keys(gather(make_spec(source=str(folder))))
    assert changed(before, after) == places(before, lambda place: place[0] is Kind.GENERATE)


def test_a_card_changes_no_key(make_spec: MakeSpec, gather: Gather, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "b")
    (folder / "README.md").write_text("# Another card")
    assert keys(gather(make_spec(source=str(folder)))) == keys(gather(make_spec()))


def downstream(units: JobUnits, kind: Kind) -> set[str]:
    """Return the keys of the units of a kind and of all that read them, directly or not."""
    found: dict[str, bool] = {}

    def reads(unit: WorkUnit) -> bool:
        if unit.key not in found:
            readers = [reads(need) for need in unit.needs]  # all of them: each one is remembered
            found[unit.key] = any(readers) or unit.kind is kind
        return found[unit.key]

    for goal in units.goals:
        reads(goal)
    return {key for key, is_reader in found.items() if is_reader}


@pytest.mark.parametrize("kind", Kind)
def test_an_algorithm_s_version_is_in_the_keys_of_all_that_comes_from_it(
    kind: Kind, make_spec: MakeSpec, gather: Gather, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = gather(make_spec())
    before = build_units(inputs, TUNING)
    monkeypatch.setitem(ALGORITHM_VERSIONS, kind, 99)
    after = {unit.key for unit in every(inputs)}
    all_keys = {unit.key for unit in reachable_units(before.goals)}
    assert all_keys - after == downstream(before, kind)


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


def test_what_is_appraised_does_not_depend_on_how_solves_are_cut(
    make_spec: MakeSpec, gather: Gather, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TILE_ROWS, "cpu", 64)
    inputs = gather(make_spec(variants=["gptq-w4.5-g64"]))
    appraised = [
        {unit.key for unit in every(inputs, tuning) if unit.kind is Kind.APPRAISE}
        for tuning in (TUNING, replace(TUNING, solve_s=1e-9))
    ]
    assert appraised[0] == appraised[1]
    # Four widths to choose from, two blocks of four groups.
    assert len(appraised[0]) == 4 * 2 * 4
