"""The functions that workers run. Read first: ``call.py``, then ``calibrate.py``, ``solve.py``, ``pack.py`` and
``evaluate.py`` in the order in which a block passes through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.graph.dag import Kind
from pipeline.graph.stages.calibrate import add_spans, calibrate, compare, embed, forward, merge_spans
from pipeline.graph.stages.call import Call
from pipeline.graph.stages.evaluate import continue_part, generate, score
from pipeline.graph.stages.pack import outer, pack
from pipeline.graph.stages.sensitivity import appraise, sense
from pipeline.graph.stages.solve import compensate, factor_group, scales, solve_range
from pipeline.graph.stages.verify import verify

ALGORITHM_VERSIONS: dict[Kind, int] = dict.fromkeys(Kind, 2) | {
    Kind.MERGE: 3,
    Kind.FACTOR: 4,
    Kind.SENSE: 3,
    Kind.SCALES: 5,
    Kind.SOLVE: 9,
    Kind.PACK: 4,
    Kind.CALIBRATE: 5,
    Kind.PROPAGATE: 5,
    Kind.FORWARD: 5,
    Kind.SCORE: 5,
    Kind.CONTINUE: 4,
    Kind.GENERATE: 6,
}
"""Part of every key: raised when a stage's code changes its output, so that stale outputs are not found."""

STAGES: dict[Kind, Callable[[Call], dict[str, Any]]] = {
    Kind.EMBED: embed,
    Kind.CALIBRATE: calibrate,
    Kind.COMPARE: compare,
    Kind.PROPAGATE: forward,
    Kind.ADD: add_spans,
    Kind.MERGE: merge_spans,
    Kind.COMPENSATE: compensate,
    Kind.FACTOR: factor_group,
    Kind.SENSE: sense,
    Kind.APPRAISE: appraise,
    Kind.SCALES: scales,
    Kind.SOLVE: solve_range,
    Kind.PACK: pack,
    Kind.OUTER: outer,
    Kind.FORWARD: forward,
    Kind.SCORE: score,
    Kind.CONTINUE: continue_part,
    Kind.GENERATE: generate,
    Kind.VERIFY: verify,
}
