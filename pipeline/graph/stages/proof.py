"""That what was computed from is what the hub announced, for sources whose weights were streamed.

Ranges cannot be checked against the announced digest of a file, so what was read is written down in the work store
(``outline.WorkDigests``). Before anything is published every file is read once from end to end by a unit of its own,
which must find the announced digest, and the tensors that it finds must be those that were written down. A job that
does not stream is held to the same as soon as its work store says that somebody streamed the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.errors import CorruptWeightsError
from pipeline.graph.build import Inputs
from pipeline.graph.cost import cost_model
from pipeline.graph.dag import Kind, Stored, WorkUnit
from pipeline.graph.outline import WEIGHTS_STAGE, proof_place, weight_groups
from pipeline.storage.work import StageRecord, WorkStore
from pipeline.tensors.streamed import MISMATCH, group_key


def weight_places(inputs: Inputs) -> list[Stored]:
    """Return where the digests of the source's tensors are written down when they are streamed."""
    index = inputs.outline.index
    return [Stored(WEIGHTS_STAGE, group_key(index, inputs.digests, names)) for names in weight_groups(inputs.outline)]


def proof_units(inputs: Inputs) -> list[WorkUnit]:
    """Return the units that read each weights file once from end to end; they run when nothing else can."""
    index, last = inputs.outline.index, inputs.outline.skeleton.num_blocks + 2
    costs, units = cost_model(inputs.device), []
    for file in index.files:
        size = sum(entry.num_bytes for owner, entry in index.entries.values() if owner == file)
        params = {"file": file, "sha256": inputs.digests[file], "size_bytes": size}
        key = proof_place(inputs.digests[file]).key
        units.append(WorkUnit(Kind.VERIFY, key, params, rank=last, cost=costs.copy_s(size), label=file))
    return units


def require_proven(inputs: Inputs, units: list[WorkUnit], records: Mapping[str, StageRecord], work: WorkStore) -> None:
    """Return when every tensor that was written down is that of a file that had the announced digest.

    Raises:
        CorruptWeightsError: naming the first that is not.
    """
    proven: dict[str, str] = {}
    for unit in units:
        proven |= records[unit.key].summary["tensors"]
    for record in work.lookup_all(weight_places(inputs)).values():
        for name, sha256 in record.summary["sha256"].items():
            if proven[name] != sha256:
                file = inputs.outline.index.entries[name][0]
                raise CorruptWeightsError(
                    f"tensor {name!r} was read with SHA-256 {sha256}, and has {proven[name]} in {file}, which has "
                    "the announced digest. What was computed from it was discarded",
                    code=MISMATCH,
                    hint="run the command again, and check any proxy or mirror between if it stays so",
                    context={"file": file, "tensor": name},
                )
