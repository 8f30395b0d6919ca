"""The driver over several real workers and real units: whatever is lost, the bytes are those of an undisturbed run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.errors import GraphError, PipelineError
from pipeline.graph import chains
from pipeline.graph.build import Inputs, build_units
from pipeline.graph.chains import HALVES
from pipeline.graph.convert import gather_inputs, load_texts
from pipeline.graph.cost import CPU_RATES, CostModel
from pipeline.graph.dag import Kind, WorkUnit, reachable_units
from pipeline.graph.driver import Driver, Observer
from pipeline.graph.executor import Finished, InlineExecutor, WorkerId
from pipeline.graph.outline import stamp_files
from pipeline.graph.parts import join_parts
from pipeline.graph.stages.call import OUTPUT, JobContext
from pipeline.graph.tuning import Tuning, make_tuning
from pipeline.graph.worker import Worker, nobody_holds
from pipeline.hub.fetch import fetch
from pipeline.hub.source import pin_source
from pipeline.quantize.solve import TILE_ROWS
from pipeline.settings import Settings
from pipeline.spec import build_spec
from pipeline.storage.work import StageRecord
from pipeline.storage.work_directory import DirectoryWorkStore
from tests.architectures import make_model
from tests.scripted_executor import Fault, ScriptedExecutor
from tests.unit.graph.conftest import SENTENCES

Records = dict[str, StageRecord]
WHOLE = Tuning(spans=1, solve_s=20.0)
CUT = Tuning(spans=3, solve_s=0.02, heldout_spans=3, workers=3)
BUDGET = 1 << 16
"""Little enough that shelves spill."""


@dataclass(frozen=True)
class Job:
    """A conversion of a small Llama of four blocks, hidden states saved at every block, by GPTQ and AWQ."""

    inputs: Inputs
    context: JobContext

    def at(self, folder: Path) -> JobContext:
        return JobContext(
            str(folder), self.context.source_folder, self.context.source_commit, self.context.stamps, "cpu", BUDGET
        )

    def goals(self, tuning: Tuning) -> list[WorkUnit]:
        return build_units(self.inputs, tuning).goals


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """A small job cut as a large one is: small tiles, sums in a tree, saves at every block. One thread, and no waiting
    for disks: power cuts are not tried here."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(chains, "SAVE_EVERY", 1)
        patch.setattr(chains, "SAVE_SHARE", 1e9)
        patch.setattr(chains, "ADDED_SPANS", 2)
        patch.setitem(TILE_ROWS, "cpu", 64)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def job(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("job")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    source = make_model("llama", root / "llama", num_hidden_layers=4, **shape)
    for name, lines in {"calibration": SENTENCES[:200], "heldout": SENTENCES[200:]}.items():
        (root / f"{name}.txt").write_text("".join(lines))
    settings = Settings("http://127.0.0.1:9", None, root / "cache", s3_endpoint=None, ray_address=None)
    plain = {"bits": 4, "group_size": 64, "clip_search": False}
    spec = build_spec(
        {
            "source": str(source),
            "variants": [
                {**plain, "method": "gptq", "format": "gptq"},
                {**plain, "method": "awq", "format": "awq", "symmetric": False, "ignore": ["re:mlp"]},
            ],
            "targets": [str(root / "out")],
            "calibration": {"text": str(root / "calibration.txt"), "samples": 10, "length": 16, "slice_sequences": 2},
            "gates": {
                "heldout": str(root / "heldout.txt"),
                "heldout_samples": 4,
                "heldout_length": 16,
                "generated_tokens": 8,
                "prompts": [{"prompt": "It was"}],
            },
        },
        "test",
    )
    fetched = fetch(pin_source(spec.source, settings), settings)
    inputs = gather_inputs(spec, fetched, load_texts(spec, settings), "cpu")
    stamps = tuple(sorted(stamp_files(fetched.folder, fetched.source.weight_files).items()))
    return Job(inputs, JobContext("", str(fetched.folder), fetched.commit, stamps, "cpu", BUDGET))


@pytest.fixture(scope="module")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The records that one worker comes to, with nothing cut."""
    folder = tmp_path_factory.mktemp("undisturbed")
    executor = InlineExecutor(Worker(job.at(folder)))
    work = DirectoryWorkStore(folder)
    records = Driver(job.goals, WHOLE, work, executor, Observer()).run()
    executor.close()
    return records


def run(
    job: Job,
    folder: Path,
    workers: int,
    *,
    seed: int = 0,
    fault: Fault | None = None,
    tuning: Tuning = CUT,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> tuple[Records, ScriptedExecutor]:
    """Run the job on scripted workers, prove every file that it left, and return its records."""
    executor = ScriptedExecutor(job.at(folder), workers, seed, fault)
    work = DirectoryWorkStore(folder)
    try:
        records = Driver(job.goals, tuning, work, executor, Observer(), is_cancelled=is_cancelled).run()
    finally:
        held = executor.held()
        executor.close()
    assert held == set(), "nobody reads any of it any more"
    for record in records.values():
        for name in record.files:
            work.open_checked(record.stage, record.key, name)
    return records, executor


def once(kind: Kind, act: Callable[[ScriptedExecutor, WorkerId, WorkUnit], PipelineError | None]) -> Fault:
    """Return a fault that strikes before the third unit of a kind."""
    seen = 0

    def fault(executor: ScriptedExecutor, name: WorkerId, unit: WorkUnit) -> PipelineError | None:
        nonlocal seen
        seen += unit.kind is kind
        if unit.kind is kind and seen == 3:
            return act(executor, name, unit)
        return None

    return fault


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_and_any_cut_give_the_same_bytes(
    job: Job, undisturbed: Records, tmp_path: Path, workers: int
) -> None:
    tuning = Tuning(workers, solve_s=20.0 / workers**4, heldout_spans=workers, workers=workers)
    records, executor = run(job, tmp_path, workers, tuning=tuning)
    assert records == undisturbed
    assert len(executor.log) == len(executor.submitted), "nothing is done twice"


@pytest.mark.parametrize("seed", range(12))
def test_workers_that_die_at_any_time_change_no_byte(job: Job, undisturbed: Records, tmp_path: Path, seed: int) -> None:
    rng, budget = random.Random(seed), 6

    def fault(executor: ScriptedExecutor, name: WorkerId, unit: WorkUnit) -> None:
        nonlocal budget
        if budget and rng.random() < 0.07:
            budget -= 1
            victim = rng.choice([name, rng.choice(sorted(executor.alive))])
            executor.lose(victim, after_work=rng.random() < 0.5)
            if len(executor.alive) < 2 or rng.random() < 0.5:
                executor.join()

    records, _ = run(job, tmp_path, 1 + seed % 4, seed=seed, fault=fault)
    assert records == undisturbed
    assert budget < 6, "nobody died"


@pytest.mark.parametrize("kind", [Kind.CALIBRATE, Kind.MERGE, Kind.FACTOR, Kind.SOLVE, Kind.PACK, Kind.FORWARD])
def test_the_only_worker_can_die_in_any_kind_of_unit(
    job: Job, undisturbed: Records, tmp_path: Path, kind: Kind
) -> None:
    def die(executor: ScriptedExecutor, name: WorkerId, unit: WorkUnit) -> None:
        executor.lose(name, after_work=True)
        executor.join()

    records, executor = run(job, tmp_path, 1, fault=once(kind, die))
    assert records == undisturbed
    stored = [unit.key for _, unit in executor.log if unit.is_durable]
    assert len(stored) == len(set(stored)), "what was stored is not computed again"


@pytest.mark.parametrize(
    ("damaged", "reader"),
    [(Kind.MERGE, Kind.SOLVE), (Kind.SOLVE, Kind.PACK), (Kind.PACK, Kind.GENERATE), (Kind.OUTER, Kind.SCORE)],
)
def test_a_flipped_byte_in_a_stored_output_is_found_and_computed_anew(
    job: Job, undisturbed: Records, tmp_path: Path, damaged: Kind, reader: Kind
) -> None:
    flipped: list[str] = []

    def flip(executor: ScriptedExecutor, name: WorkerId, unit: WorkUnit) -> None:
        needs = [need for need in unit.needs if need.kind is damaged]
        if flipped or unit.kind is not reader or not needs:
            return
        path = DirectoryWorkStore(tmp_path).stage_dir(*needs[0].place) / OUTPUT
        data = bytearray(path.read_bytes())
        data[-5] ^= 0x40
        path.write_bytes(data)
        flipped.append(needs[0].key)
        for worker in executor.alive.values():  # which may have kept a copy, as long as there is room
            worker.forget([needs[0].key])

    records, executor = run(job, tmp_path, 2, fault=flip)
    assert records == undisturbed
    ran = [unit.key for _, unit in executor.log]
    assert ran.count(flipped[0]) == 2


def test_memory_that_runs_out_cuts_units_and_changes_no_byte(job: Job, undisturbed: Records, tmp_path: Path) -> None:
    def fail(executor: ScriptedExecutor, name: WorkerId, unit: WorkUnit) -> PipelineError:
        return GraphError("too large", code="graph.out_of_memory")

    records, executor = run(job, tmp_path, 2, fault=once(Kind.CALIBRATE, fail), tuning=WHOLE)
    assert records == undisturbed
    widths = {unit.params["high"] - unit.params["low"] for _, unit in executor.log if unit.kind is Kind.CALIBRATE}
    assert len(widths) > 1


@pytest.mark.parametrize("fits", [2, 1])
@pytest.mark.parametrize("is_silent", [False, True], ids=["an error", "deaths without a word"])
def test_units_that_are_too_long_are_halved_until_they_fit(
    job: Job, undisturbed: Records, tmp_path: Path, fits: int, is_silent: bool
) -> None:
    """With weights that are slow to take in two workers are soonest done with the fewest spans; they get what they
    need."""
    costs = CostModel(replace(CPU_RATES, weight_bytes=1e6), TILE_ROWS["cpu"])
    soonest = make_tuning(job.inputs.outline, job.inputs.spec, 2, costs)
    assert soonest.spans == HALVES
    failed: list[int] = []

    def fail(executor: ScriptedExecutor, name: WorkerId, unit: WorkUnit) -> PipelineError | None:
        length = unit.params["high"] - unit.params["low"] if unit.kind is Kind.CALIBRATE else 0
        if length <= fits:
            return None
        failed.append(length)
        if not is_silent:
            return GraphError("too large", code="graph.out_of_memory")
        executor.lose(name)
        executor.join()
        return None

    records, executor = run(job, tmp_path, 2, fault=fail, tuning=soonest)
    assert records == undisturbed
    assert list(dict.fromkeys(failed)) == [4, 2][: 3 - fits]
    assert failed.count(4) == 1 + is_silent
    lengths = {unit.params["high"] - unit.params["low"] for _, unit in executor.log if unit.kind is Kind.CALIBRATE}
    assert max(lengths) == fits


@pytest.mark.parametrize(("first", "second"), [(3, 1), (1, 4)])
def test_a_job_that_was_cancelled_goes_on_with_another_number_of_workers(
    job: Job, undisturbed: Records, tmp_path: Path, first: int, second: int
) -> None:
    begun = 0

    def count(executor: ScriptedExecutor, name: WorkerId, unit: WorkUnit) -> None:
        nonlocal begun
        begun += 1

    with pytest.raises(GraphError, match="cancelled"):
        run(job, tmp_path, first, fault=count, tuning=Tuning(first, 20.0, first), is_cancelled=lambda: begun >= 60)
    stored = set(tmp_path.glob("*/*/*/record.json"))
    assert any(path.parts[-4] == "hidden" for path in stored)
    records, executor = run(job, tmp_path, second, tuning=Tuning(second, 20.0, second))
    assert records == undisturbed
    done_before = {path.parent.name for path in stored}
    assert not {unit.key for _, unit in executor.log if unit.is_durable} & done_before
    blocks = {unit.block for _, unit in executor.log if unit.kind is Kind.CALIBRATE}
    assert 0 not in blocks, "calibration goes on from the saved hidden states"


def test_two_jobs_in_one_store_do_not_disturb_each_other(job: Job, undisturbed: Records, tmp_path: Path) -> None:
    """One ends while the other is under way, and drops the hidden states that both saved."""
    goals = build_units(job.inputs, CUT)
    ended: list[Records] = []

    def end_the_other(executor: ScriptedExecutor, name: WorkerId, unit: WorkUnit) -> None:
        records, _ = run(job, tmp_path, 2, seed=1)
        for place in goals.leftovers:
            DirectoryWorkStore(tmp_path).discard(*place)
        ended.append(records)

    for number, kind in enumerate((Kind.CALIBRATE, Kind.FORWARD)):
        records, _ = run(job, tmp_path / str(number), 2, fault=once(kind, end_the_other))
        assert records == undisturbed
    assert ended == [undisturbed, undisturbed]


def test_no_unit_writes_to_what_it_reads(job: Job, tmp_path: Path) -> None:
    """Every unit gives the same bits when it is run again with the same inputs, as it is after a worker was lost."""
    worker = Worker(job.at(tmp_path))
    work = DirectoryWorkStore(tmp_path)
    kinds: set[Kind] = set()

    class Twice(InlineExecutor):
        def forget(self, worker: WorkerId, keys: object) -> None:
            pass

        def wait(self, timeout_s: float) -> Finished | None:
            event = super().wait(timeout_s)
            assert isinstance(event, Finished)
            unit, record = event.unit, event.outcome.record
            kinds.add(unit.kind)
            if record is not None:
                work.discard(*unit.place)
                assert worker.run(unit, nobody_holds).record == record
            else:
                first = join_parts(partial(worker.hand_over, unit.key, ""))
                assert worker.run(unit, nobody_holds).error is None
                second = join_parts(partial(worker.hand_over, unit.key, ""))
                assert first.keys() == second.keys()
                assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), unit.title
            return event

    executor = Twice(worker)
    Driver(job.goals, WHOLE, work, executor, Observer()).run()
    executor.close()
    assert kinds == {unit.kind for unit in reachable_units(job.goals(WHOLE))}
