"""One weights file read from end to end."""

from __future__ import annotations

from typing import Any

from pipeline.errors import CorruptWeightsError
from pipeline.graph.stages.call import Call
from pipeline.tensors.streamed import MISMATCH


def verify(call: Call) -> dict[str, Any]:
    """Require that a file has the announced digest, and return those of its tensors.

    Raises:
        CorruptWeightsError: when it has another.
    """
    file, announced = call.params["file"], call.params["sha256"]
    found, tensors = call.source.weights.digest_tensors(file)
    if found != announced:
        call.source.weights.forget(file)
        raise CorruptWeightsError(
            f"{file} came with SHA-256 {found}, {announced} was announced. What was computed from it was discarded",
            code=MISMATCH,
            hint="run the command again, and check any proxy or mirror between if it stays so",
            context={"file": file, "expected": announced, "got": found},
        )
    return {"tensors": tensors}
