"""One worker: what its units read and leave, and what becomes of their failures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import heap
from pipeline.errors import PipelineError
from pipeline.graph.dag import Kind, Stored, WorkUnit
from pipeline.graph.parts import join_parts
from pipeline.graph.stages import call as call_module
from pipeline.graph.stages.call import LOST, Call, JobContext
from pipeline.graph.worker import KEPT_COPIES, Worker, _shelf_bytes, _spare_of_peak, nobody_holds
from pipeline.storage.work_directory import DirectoryWorkStore
from tests.unit.graph.toys import as_digest, as_tensors, combine, hidden, passing, run_toy, unit

Stage = Callable[[Call], dict[str, Any]]


pytestmark = pytest.mark.usefixtures("toy_stages")


@pytest.fixture
def work(tmp_path: Path) -> DirectoryWorkStore:
    return DirectoryWorkStore(tmp_path)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(JobContext(str(tmp_path), "", "", (), "cpu", shelf_bytes=1000))


def failure(worker: Worker, wanted: WorkUnit) -> PipelineError:
    outcome = worker.run(wanted, nobody_holds)
    assert outcome.record is None
    assert outcome.error is not None
    return outcome.error


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - {"commit"}


def test_a_durable_output_goes_to_the_store_and_a_passing_one_to_the_shelf(
    worker: Worker, work: DirectoryWorkStore
) -> None:
    a, p = unit("a"), passing("p")
    outcome = worker.run(a, nobody_holds)
    assert outcome.error is None
    assert outcome.record == work.lookup(*a.place)
    assert worker.shelf.get(a.key) is None
    assert worker.run(p, nobody_holds).record is None
    assert as_digest(join_parts(partial(worker.hand_over, p.key, ""))) == combine("p", [])
    assert work.lookup(*p.place) is None
    worker.forget([p.key])
    assert worker.shelf.get(p.key) is None


def test_inputs_come_from_the_shelf_the_store_or_another_worker(worker: Worker) -> None:
    stored, own, foreign = unit("stored"), passing("own"), passing("foreign")
    reader = unit("reader", stored, own, foreign)
    asked: list[tuple[str, str]] = []

    def fetch(key: str, prefix: str) -> Mapping[str, torch.Tensor]:
        asked.append((key, prefix))
        return as_tensors(combine("foreign", []))

    for need in (stored, own):
        worker.run(need, nobody_holds)
    record = worker.run(reader, fetch).record
    assert record is not None
    assert record.summary["digest"] == combine("reader", [combine(name, []) for name in ("stored", "own", "foreign")])
    assert asked == [(foreign.key, "")]


def test_a_finished_unit_is_not_run_again(worker: Worker, toy_stages: dict[Kind, Stage]) -> None:
    first = worker.run(unit("a"), nobody_holds)
    toy_stages[Kind.SOLVE] = lambda call: pytest.fail("it is finished")
    assert worker.run(unit("a"), nobody_holds).record == first.record


@pytest.mark.parametrize("kind", [Kind.MERGE, Kind.SOLVE])
def test_copies_are_kept_of_what_is_read_again_soon(worker: Worker, work: DirectoryWorkStore, kind: Kind) -> None:
    wanted = unit("a", kind=kind)
    worker.run(wanted, nobody_holds)
    assert (worker.shelf.get(wanted.key) is not None) is (kind in KEPT_COPIES)


def test_what_nobody_holds_is_lost_by_name(worker: Worker) -> None:
    need = passing("need")
    error = failure(worker, unit("reader", need))
    assert (error.code, error.context) == (LOST, {"key": need.key})
    with pytest.raises(PipelineError, match="held by no worker"):
        worker.hand_over(need.key, "", 0)


def test_what_is_not_stored_any_more_is_missed_by_name(worker: Worker) -> None:
    need = unit("need")
    error = failure(worker, unit("reader", need))
    assert (error.code, error.context) == ("storage.missing_stage", need.place._asdict())


def test_a_damaged_input_is_discarded_and_told(worker: Worker, work: DirectoryWorkStore) -> None:
    need = unit("need")
    worker.run(need, nobody_holds)
    path = work.stage_dir(*need.place) / "output.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    outcome = worker.run(unit("reader", need), nobody_holds)
    assert outcome.error is not None
    assert (outcome.error.code, outcome.error.context) == ("storage.damaged_stage", need.place._asdict())
    assert [(stage.stage, stage.key) for stage in outcome.damaged] == [need.place]
    assert work.lookup(*need.place) is None
    assert worker.run(need, nobody_holds).damaged == (), "told once"


def vanish_when_checked(monkeypatch: pytest.MonkeyPatch, work: DirectoryWorkStore, place: Stored) -> None:
    """Have another run discard a place between the check of its digest and the reading of its file."""
    original = call_module.read_file_tensors

    def read(path: Path, *arguments: Any) -> Any:
        work.discard(*place)
        return original(path, *arguments)

    monkeypatch.setattr(call_module, "read_file_tensors", read)


def vanish_when_looked_up(monkeypatch: pytest.MonkeyPatch, work: DirectoryWorkStore, place: Stored) -> None:
    """Have another run discard a place between the look at its record and the check of its digest."""
    original, looks = DirectoryWorkStore.lookup, 0

    def lookup(self: DirectoryWorkStore, stage: str, key: str) -> Any:
        nonlocal looks
        found = original(self, stage, key)
        looks += (stage, key) == place
        if looks == 2:  # the first was whether to read it at all
            shutil.rmtree(work.stage_dir(*place), ignore_errors=True)
        return found

    monkeypatch.setattr(DirectoryWorkStore, "lookup", lookup)


@pytest.mark.parametrize("vanish", [vanish_when_checked, vanish_when_looked_up])
def test_states_that_another_run_drops_while_they_are_read_are_missing(
    worker: Worker,
    work: DirectoryWorkStore,
    monkeypatch: pytest.MonkeyPatch,
    vanish: Callable[[pytest.MonkeyPatch, DirectoryWorkStore, Stored], None],
) -> None:
    """Two runs share a work directory: the one that ends first drops the hidden states that it saved."""
    place = hidden("saved")
    first = passing("first", saves=(place,))
    worker.run(first, nobody_holds)
    worker.forget([first.key])
    reader = unit("reader", first, stand_ins={first.key: (place,)})
    vanish(monkeypatch, work, place)
    error = failure(worker, reader)
    assert (error.code, error.context) == ("storage.missing_stage", place._asdict())


def out_of_memory(call: Call) -> dict[str, Any]:
    raise MemoryError("no more")


def out_of_memory_in_torch(call: Call) -> dict[str, Any]:
    call.put({"x": torch.empty(1 << 60, dtype=torch.uint8)})
    return {}


@pytest.mark.parametrize("stage", [out_of_memory, out_of_memory_in_torch])
@pytest.mark.parametrize("make", [unit, passing])
def test_memory_that_runs_out_is_told_as_such_and_leaves_nothing(
    worker: Worker,
    toy_stages: dict[Kind, Stage],
    tmp_path: Path,
    stage: Stage,
    make: Callable[[str], WorkUnit],
) -> None:
    wanted = replace(make("greedy"), block=3)
    toy_stages[wanted.kind] = stage
    error = failure(worker, wanted)
    assert error.code == "graph.out_of_memory"
    assert f"{wanted.kind} of block 3, greedy ran out of memory" in error.message
    assert not any(name.endswith((".safetensors", ".json")) for name in files(tmp_path))
    assert worker.shelf.get(wanted.key) is None
    toy_stages[wanted.kind] = run_toy
    assert worker.run(wanted, nobody_holds).error is None


def test_a_bug_is_not_taken_for_a_lack_of_memory(worker: Worker, toy_stages: dict[Kind, Stage]) -> None:
    def multiply(call: Call) -> dict[str, Any]:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
        return {}

    toy_stages[Kind.SOLVE] = multiply
    with pytest.raises(RuntimeError, match="shapes"):
        worker.run(unit("a"), nobody_holds)


def test_a_unit_that_fails_leaves_nothing_and_can_be_run_again(
    worker: Worker, work: DirectoryWorkStore, toy_stages: dict[Kind, Stage], tmp_path: Path
) -> None:
    def half(call: Call) -> dict[str, Any]:
        call.put(as_tensors(combine("half", [])))
        call.write()
        raise PipelineError("the weights are not finite", code="source.not_finite")

    toy_stages[Kind.SOLVE] = half
    assert failure(worker, unit("a")).code == "source.not_finite"
    assert "output.safetensors" not in files(tmp_path)
    toy_stages[Kind.SOLVE] = run_toy
    assert worker.run(unit("a"), nobody_holds).record == work.lookup(*unit("a").place)


def test_what_was_spilled_goes_with_the_worker(tmp_path: Path) -> None:
    worker = Worker(JobContext(str(tmp_path), "", "", (), "cpu", shelf_bytes=0))
    for name in ("a", "b"):
        worker.run(passing(name), nobody_holds)
    assert f"{passing('a').key}.safetensors" in files(tmp_path)
    worker.close()
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("device", "max_memory_bytes", "expected"), [("cpu", None, 1000), ("cuda", None, 3 * 10**9), ("cuda", 10**9, 1000)]
)
def test_an_accelerator_s_memory_is_for_the_shelf_too_unless_memory_is_limited(
    monkeypatch: pytest.MonkeyPatch, device: str, max_memory_bytes: int | None, expected: int
) -> None:
    properties = SimpleNamespace(total_memory=10**10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    context = JobContext("", "", "", (), device, shelf_bytes=1000, max_memory_bytes=max_memory_bytes)
    assert _shelf_bytes(context) == expected


def test_what_is_to_spare_is_what_the_process_has_had_and_has_no_more() -> None:
    held = torch.ones(100_000_000)
    taken = 4 * held.numel()
    assert _spare_of_peak(2 * taken) < taken // 2 or heap.peak_bytes() > heap.resident_bytes() + taken
    del held
    spare = _spare_of_peak(10**15)
    assert taken * 0.9 < spare <= heap.peak_bytes()
    assert _spare_of_peak(1000) == 1000


def test_memory_is_given_back_before_a_unit_that_needs_what_others_leave_unused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    context = JobContext(str(tmp_path), "", "", (), "cpu", 10**9, freed_bytes=1000, more_freed_bytes={Kind.SOLVE: 500})
    worker, used_bytes, given_back = Worker(context), heap.private_bytes(), []
    monkeypatch.setattr(worker, "_kept_bytes", used_bytes + context.freed_bytes)
    monkeypatch.setattr(heap, "give_back", lambda: given_back.append(freed_bytes))
    for freed_bytes in (900, 1400, 1600):
        held_bytes = worker.shelf.memory_bytes
        monkeypatch.setattr(heap, "private_bytes", lambda value=used_bytes + held_bytes + freed_bytes: value)
        for kind in (Kind.SOLVE, Kind.PACK):
            assert worker.run(unit(f"{kind} {freed_bytes}", kind=kind), nobody_holds).error is None
    assert given_back == [1400, 1600, 1600]
