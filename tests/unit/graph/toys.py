"""Work units whose outputs are digests: the real driver, workers, shelves and store run them in no time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.fingerprint import digest_bytes, fingerprint
from pipeline.graph.dag import Kind, Stored, WorkUnit
from pipeline.graph.stages.call import Call
from pipeline.graph.tuning import Tuning

Digest = str


def unit(name: str, *needs: WorkUnit, is_durable: bool = True, kind: Kind | None = None, **fields: Any) -> WorkUnit:
    """Return a toy unit; a passing one is a FORWARD, a durable one a SOLVE, unless told otherwise."""
    kind = kind or (Kind.SOLVE if is_durable else Kind.FORWARD)
    return WorkUnit(kind, fingerprint(name), {"name": name}, needs, is_durable=is_durable, label=name, **fields)


def passing(name: str, *needs: WorkUnit, **fields: Any) -> WorkUnit:
    return unit(name, *needs, is_durable=False, **fields)


def hidden(name: str) -> Stored:
    """Return a place beside the units' outputs."""
    return Stored("hidden", fingerprint(["hidden", name]))


def combine(name: str, inputs: Sequence[Digest]) -> Digest:
    return digest_bytes("|".join([name, *inputs]).encode())


def as_tensors(digest: Digest) -> dict[str, Tensor]:
    return {"x": torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)}


def as_digest(tensors: Mapping[str, Tensor]) -> Digest:
    return bytes(tensors["x"].tolist()).hex()


def run_toy(call: Call) -> dict[str, Any]:
    """Write the digest of the unit's name and of what it reads."""
    inputs = []
    for need in call.unit.needs:
        places = call.unit.stand_ins.get(need.key, ())
        is_saved = places and call.shelf.get(need.key) is None and all(call.work.lookup(*place) for place in places)
        inputs.append(as_digest(call.read(places[0]) if is_saved else call.get(need)))
    digest = combine(call.params["name"], inputs)
    call.put(as_tensors(digest))
    for place in call.unit.saves:
        call.save(place, as_tensors(digest))
    return {"digest": digest}


def expected(goals: Sequence[WorkUnit]) -> dict[str, Digest]:
    """Return what durable goals must come to, by key."""
    known: dict[str, Digest] = {}

    def value(wanted: WorkUnit) -> Digest:
        if wanted.key not in known:
            known[wanted.key] = combine(wanted.params["name"], [value(need) for need in wanted.needs])
        return known[wanted.key]

    return {goal.key: value(goal) for goal in goals if goal.is_durable}


def in_parts(tuning: Tuning) -> list[WorkUnit]:
    """Return a sum over parts as numerous as the tuning's spans, up to four, and what came before it."""
    merged = unit("merged")
    factor = passing("factor", merged)
    number = min(tuning.spans, 4)
    return [unit("before"), *(unit(f"part{n} of {number}", merged, factor) for n in range(number))]


def random_goals(seed: int) -> list[WorkUnit]:
    """Return goals over chains with homes and saved states, sums over them, shared passing factors, and solves."""
    rng = random.Random(seed)
    num_spans, num_blocks, save_every = rng.randint(1, 4), rng.randint(1, 6), rng.choice([1, 2, 3])
    ranks = rng.random() < 0.5
    goals: list[WorkUnit] = []
    before = [passing(f"embed{span}", home=f"c:{span}", cost=1.0) for span in range(num_spans)]
    for block in range(num_blocks):
        row = []
        for span, previous in enumerate(before):
            name = f"c{block}.{span}"
            is_saved = block % save_every == save_every - 1 and block < num_blocks - 1
            old = block - 2 * save_every
            row.append(
                passing(
                    name,
                    previous,
                    stand_ins={previous.key: previous.saves} if previous.saves else {},
                    saves=(hidden(name),) if is_saved else (),
                    obsoletes=(hidden(f"c{old}.{span}"),) if is_saved and old >= 0 else (),
                    home=f"c:{span}",
                    rank=block - 2 if ranks else 0,
                    cost=1.0,
                )
            )
        before = row
        for group in range(rng.randint(1, 2)):
            merged = unit(f"m{block}.{group}", *row, kind=Kind.MERGE, rank=block - 2, cost=0.5)
            factor = passing(f"f{block}.{group}", merged, kind=Kind.FACTOR, rank=block, cost=0.5)
            parts = [
                unit(f"s{block}.{group}.{part}", merged, factor, rank=block, cost=2.0)
                for part in range(rng.randint(1, 3))
            ]
            goals.append(unit(f"p{block}.{group}", *parts, kind=Kind.PACK, rank=block, cost=0.5))
    packs = list(goals)
    state = [passing("v", home="v:0", cost=1.0)]
    for number, packed in enumerate(packs):
        state.append(passing(f"v{number}", state[-1], packed, home="v:0", rank=number + 0.5, cost=1.0))
    goals.append(unit("score", state[-1], before[0], kind=Kind.SCORE, rank=num_blocks, cost=0.1))
    return goals
