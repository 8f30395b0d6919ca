"""Continuations of models that are too large for one worker: the same tokens, however the blocks are cut into parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.graph import continuations
from pipeline.graph.build import Inputs, build_units
from pipeline.graph.cost import CostModel, cost_model
from pipeline.graph.dag import Kind, WorkUnit, reachable_units
from pipeline.graph.driver import Driver, Observer
from pipeline.graph.executor import InlineExecutor
from pipeline.graph.outline import stamp_files
from pipeline.graph.stages.call import Call, JobContext
from pipeline.graph.tuning import Tuning
from pipeline.graph.worker import Worker
from pipeline.spec import ConversionSpec
from pipeline.storage.work_directory import DirectoryWorkStore
from tests.architectures import make_model
from tests.scripted_executor import Fault, ScriptedExecutor

NUM_BLOCKS, NUM_TOKENS = 4, 9
PROMPTS = ("It was a cold morning", "In the year 1600 the ship", "Nobody")
TUNING = Tuning(spans=1, solve_s=20.0)
Continued = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # power cuts are not tried here
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def job(make_spec: Callable[..., ConversionSpec], gather: Callable[..., Inputs], tmp_path: Path) -> Inputs:
    """A model of four blocks with one variant that is quick to make."""
    folder = make_model("llama", tmp_path / "llama4", num_hidden_layers=NUM_BLOCKS)
    gates = {"generated_tokens": NUM_TOKENS, "prompts": [{"prompt": prompt} for prompt in PROMPTS]}
    return gather(make_spec(source=str(folder), variants=["rtn-w8-g64"], gates=gates))


def costs(inputs: Inputs, blocks_per_part: int) -> CostModel:
    model = cost_model("cpu")
    shape = inputs.outline
    block = sum(shape.tensor_elements(name) for name in shape.skeleton.block_tensors(0).values())
    room = continuations.KEPT_PARTS * blocks_per_part * model.rates.weight_size * block
    return replace(model, rates=replace(model.rates, resident_bytes=float(room)))


def context(inputs: Inputs, folder: Path, shelf_bytes: int = 1 << 30) -> JobContext:
    source = Path(inputs.spec.source)
    stamps = tuple(sorted(stamp_files(source, inputs.outline.index.files).items()))
    return JobContext(str(folder), str(source), "commit", stamps, "cpu", shelf_bytes)


def goals(inputs: Inputs, tuning: Tuning, model: CostModel) -> list[WorkUnit]:
    units = build_units(inputs, tuning, model)
    return [units.source_generation, *(variant.generation for variant in units.variants.values())]


def run(
    inputs: Inputs,
    folder: Path,
    model: CostModel,
    workers: int = 0,
    fault: Fault | None = None,
    shelf_bytes: int = 1 << 30,
) -> Continued:
    """Continue with the source and the variant, in this thread or on scripted workers."""
    own = context(inputs, folder, shelf_bytes)
    executor = ScriptedExecutor(own, workers, 1, fault) if workers else InlineExecutor(Worker(own))
    tuning = replace(TUNING, workers=max(workers, 1))
    driver = Driver(lambda cut: goals(inputs, cut, model), tuning, DirectoryWorkStore(folder), executor, Observer())
    records = driver.run()
    executor.close()
    return [records[goal.key].summary["continuations"] for goal in goals(inputs, tuning, model)]


def test_parts_give_the_tokens_that_the_whole_model_gives(
    job: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(job, tmp_path / "whole", cost_model("cpu"))
    assert [len(continued["ids"]) for model in whole for continued in model] == [NUM_TOKENS] * 2 * len(PROMPTS)
    assert whole[0] != whole[1], "the variant says something else"
    monkeypatch.setattr(continuations, "RESIDENT_BYTES", 0)
    for blocks_per_part in (1, 3, NUM_BLOCKS):
        assert run(job, tmp_path / str(blocks_per_part), costs(job, blocks_per_part)) == whole


def test_parts_on_several_workers_that_die_give_the_same_tokens(
    job: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "RESIDENT_BYTES", 0)
    whole = run(job, tmp_path / "inline", costs(job, NUM_BLOCKS))
    seen = 0

    def die(executor: ScriptedExecutor, name: str, unit: WorkUnit) -> None:
        nonlocal seen
        seen += unit.kind is Kind.CONTINUE
        if unit.kind is Kind.CONTINUE and seen in (20, 60):
            seen += 1
            executor.lose(name, after_work=False)
            executor.join()

    # Little memory: weights are dropped and taken in again.
    assert run(job, tmp_path / "workers", costs(job, 1), 3, die, shelf_bytes=100_000) == whole
    assert seen > 60


def test_an_ended_prompt_is_passed_on_as_it_is(job: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "RESIDENT_BYTES", 0)
    ids = run(job, tmp_path / "first", costs(job, 2))[0][0]["ids"]
    config = Path(job.spec.source) / "generation_config.json"
    config.write_text(f'{{"eos_token_id": {ids[3]}}}')
    changed = replace(job, digests={**job.digests, config.name: "e" * 64})
    from pipeline.graph.stages import evaluate

    evaluate._tokenizer.cache_clear()
    again = run(changed, tmp_path / "second", costs(job, 2))
    assert again[0][0]["ids"] == ids[: ids.index(ids[3])]


def test_units_after_a_draft_that_agrees_have_nothing_to_do(
    job: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.graph.stages import evaluate

    monkeypatch.setattr(continuations, "RESIDENT_BYTES", 0)
    entered: dict[str, list[int]] = {"": [], "rtn-w8-g64": []}
    plain = evaluate._tried

    def tried(call: Call, state: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        found = plain(call, state, number)
        entered[call.unit.variant].append(len(found) - int(state[f"num_own.{number}"]))
        return found

    monkeypatch.setattr(evaluate, "_tried", tried)
    source, variant = run(job, tmp_path / "work", costs(job, NUM_BLOCKS))
    assert sorted(entered[""]) == sorted([*range(NUM_TOKENS)] * len(PROMPTS)), "the source goes token by token"
    expected = []
    for ours, theirs in zip(source, variant, strict=True):
        agreed = next((n for n in range(NUM_TOKENS) if ours["ids"][n] != theirs["ids"][n]), NUM_TOKENS)
        expected += [NUM_TOKENS - 1, *range(agreed + 1, NUM_TOKENS)]
    assert sorted(entered["rtn-w8-g64"]) == sorted(expected)


def test_how_blocks_are_cut_is_in_no_key_of_what_is_stored(job: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {goal.key for goal in goals(job, TUNING, cost_model("cpu"))}
    monkeypatch.setattr(continuations, "RESIDENT_BYTES", 0)
    for blocks_per_part in (1, 2):
        assert {goal.key for goal in goals(job, TUNING, costs(job, blocks_per_part))} == whole


def test_units_of_a_part_are_at_home_together_and_models_take_turns(
    job: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuations, "RESIDENT_BYTES", 0)
    source, variant = goals(job, TUNING, costs(job, 1))
    steps = [unit for unit in reachable_units([source, variant]) if unit.kind is Kind.CONTINUE]
    # A worker that cannot keep all parts takes all prompts through one before it takes in the next.
    assert len(steps) == 2 * NUM_BLOCKS * (NUM_TOKENS + 1)
    homes: dict[str, set[tuple[str, int, int]]] = {}
    for unit in steps:
        homes.setdefault(unit.home, set()).add((unit.variant, unit.params["first"], unit.params["last"]))
    assert sorted(map(list, homes.values())) == sorted(
        [(name, block, block + 1)] for name in ("", "rtn-w8-g64") for block in range(NUM_BLOCKS)
    )
    loads = [unit for unit in steps if unit.params["step"] == continuations.LOAD]
    assert {unit.after for unit in loads if not unit.variant} == {()}
    assert {unit.after for unit in loads if unit.variant} == {(source.key,)}
    roomy = reachable_units(goals(job, replace(TUNING, workers=8), costs(job, 1)))
    assert not any(unit.after for unit in roomy if unit.kind is Kind.CONTINUE)
    assert sum(unit.kind is Kind.CONTINUE for unit in roomy) == 2 * NUM_BLOCKS * (len(PROMPTS) * NUM_TOKENS + 1)
