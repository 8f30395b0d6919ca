"""Continuing the smoke prompts with a model too large to stay in one worker's memory, as units.

A token follows from all blocks and the next token from it, so this is a chain of as many passes as there are tokens.
Reading every block for every token would make it the longest chain of a job by far. So the blocks are cut into *parts*
that stay in memory: one unit takes a prompt (or all of them) through one part for one token, the units of a part are at
home on one worker, and that worker reads the part once, as soon as it is there. Prompts follow each other through the
parts, or go together where parts do not stay; models follow each other as far as their parts do not fit into the
workers' memory. A variant takes what the source said along as a draft: as far as it agrees, it is through with all of
that in one pass, and the units of later tokens find nothing to do. None of this changes a byte but the draft, which is
in the variant's key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.graph.cost import CostModel
from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.identity import Keyring

RESIDENT_BYTES = 2 << 30
"""A model whose blocks take more than this in float32 is continued in parts."""

Part = tuple[int, int]
"""First block, and the block after the last."""

LOAD = -1
"""The step before the first token, in which workers take their parts in."""

KEPT_PARTS = 2
"""Parts that a worker can keep in memory."""

PROMPT_TOKENS = 32
"""Tokens of a prompt with half of its continuation, for costs."""

AGREED_SHARE = 0.4
"""Share of the source's continuation that a variant agrees with before it parts from it, for costs. Of the 135 M
parameter SmolLM2 and the default prompts: 0.74 at 8 bit, 0.03 at 4 bit, plain rounding in groups of 64, 2026-11-25."""


def expected_passes(num_tokens: int, *, is_guided: bool) -> int:
    """Return in how many passes a continuation is likely made, with the source's as a draft or without."""
    return num_tokens - int(AGREED_SHARE * num_tokens) if is_guided else num_tokens


class ContinuationBuilder:
    """Makes the units that continue prompts with a source and its variants, one model after the other."""

    def __init__(self, keys: Keyring, costs: CostModel, num_workers: int) -> None:
        self.keys, self.costs, self._num_workers = keys, costs, num_workers
        self._made: list[str] = []
        self._num_blocks = keys.outline.skeleton.num_blocks
        self._parameters = [keys.block_parameters(block) for block in range(self._num_blocks)]

    @property
    def is_split(self) -> bool:
        """Whether the model is continued in parts: it follows from the model alone, as bytes do."""
        return 4 * sum(self._parameters) > RESIDENT_BYTES

    def split(
        self, unit: WorkUnit, packs: Sequence[WorkUnit], outer: Sequence[WorkUnit], source: Sequence[WorkUnit]
    ) -> WorkUnit:
        """Return the unit that continues all prompts, reading what parts of the model made of them token by token.

        Args:
            unit: Continues the prompts with the whole model.
            packs: The variant's blocks; none for the source.
            outer: What lies outside the blocks, of the variant; none for the source.
            source: Continues the prompts with the source; none for itself.
        """
        parts = self._parts()
        at_once = max(1, KEPT_PARTS * self._num_workers // len(parts))
        after = tuple(self._made[-at_once:][:1]) if len(self._made) >= at_once else ()
        unit = replace(unit, rank=unit.rank + len(self._made))
        self._made.append(unit.key)
        reads = [
            [*packs[first:last], *(outer if first == 0 or last == self._num_blocks else ())] for first, last in parts
        ]
        loads = [
            replace(self._unit(unit, [], LOAD, number, part, own), after=after)
            for number, (part, own) in enumerate(zip(parts, reads, strict=True))
        ]
        ends: list[WorkUnit] = []
        for prompts in self._chains(unit.params["prompts"], len(parts)):
            made: list[WorkUnit] = []
            for step in range(unit.params["max_tokens"]):
                for number, (part, own) in enumerate(zip(parts, reads, strict=True)):
                    drafts = source if step == number == 0 else ()
                    made = [self._unit(unit, prompts, step, number, part, [*made, loads[number], *own, *drafts])]
            ends += made
        params = {**unit.params, "is_split": True}
        return replace(unit, params=params, needs=tuple(ends), cost=self.costs.rates.unit_s)

    def _chains(self, prompts: Sequence[str], num_parts: int) -> list[list[str]]:
        """Return which prompts go through the parts together: each alone, as that is sooner done, unless parts have to
        be taken in again for every one of them."""
        is_tight = KEPT_PARTS * self._num_workers < num_parts
        return [list(prompts)] if is_tight else [[prompt] for prompt in prompts]

    def _parts(self) -> list[Part]:
        parts: list[Part] = []
        first = size = 0
        for block, parameters in enumerate(self._parameters):
            own = self.costs.rates.weight_size * parameters
            if block > first and size + own > self.costs.rates.resident_bytes / KEPT_PARTS:
                parts.append((first, block))
                first, size = block, 0
            size += own
        return [*parts, (first, self._num_blocks)]

    def _unit(
        self, unit: WorkUnit, prompts: list[str], step: int, number: int, part: Part, reads: Sequence[WorkUnit]
    ) -> WorkUnit:
        """Return the unit that takes prompts through the ``number``-th part for the token ``step``, or takes the part
        in."""
        place = {"prompts": prompts, "step": step, "first": part[0], "last": part[1]}
        max_tokens: int = unit.params["max_tokens"]
        params: dict[str, Any] = {
            **place,
            "of": unit.key,
            "max_tokens": max_tokens,
            "quantization_config": unit.params["quantization_config"],
            "is_idle": step >= expected_passes(max_tokens, is_guided=bool(unit.variant)),
        }
        parameters = sum(self._parameters[part[0] : part[1]])
        return WorkUnit(
            Kind.CONTINUE,
            self.keys.key(Kind.CONTINUE, {"of": unit.key, **place}),
            params,
            tuple(reads),
            is_durable=False,
            home=f"continue:{unit.variant or 'source'}:{number}",
            rank=unit.rank,
            cost=self._cost_s(parameters, params),
            out_bytes=4.0 * len(prompts) * PROMPT_TOKENS * self.keys.outline.groups[0][0].in_features,
            variant=unit.variant,
        )

    def _cost_s(self, parameters: float, params: Mapping[str, Any]) -> float:
        if params["step"] == LOAD:
            return self.costs.load_s(parameters)
        num_prompts = 0 if params["is_idle"] else len(params["prompts"])
        return self.costs.continue_s(parameters, num_prompts, PROMPT_TOKENS)
