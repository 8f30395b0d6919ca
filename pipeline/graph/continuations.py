"""Continuing the smoke prompts with a model too large to stay in one worker's memory, as units.

A token follows from all blocks and the next token from it, so this is a chain of as many passes as there are tokens.
Reading every block for every token would make it the longest chain of a job by far. So the blocks are cut into *parts*
that stay in memory: one unit takes a prompt through one part for one token, the units of a part are at home on one
worker, and that worker reads the part once. Prompts follow each other through the parts. How blocks are cut changes no
byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.graph.cost import CostModel
from pipeline.graph.dag import Kind, WorkUnit
from pipeline.graph.identity import Keyring
from pipeline.validate.generation import RESIDENT_BYTES

Part = tuple[int, int]
"""First block, and the block after the last."""

PROMPT_TOKENS = 32
"""Tokens of a prompt with half of its continuation, for costs."""


class ContinuationBuilder:
    """Makes the units that continue prompts with one source or its variants."""

    def __init__(self, keys: Keyring, costs: CostModel) -> None:
        self.keys, self.costs = keys, costs
        self._num_blocks = keys.outline.skeleton.num_blocks
        self._parameters = [keys.block_parameters(block) for block in range(self._num_blocks)]

    @property
    def is_split(self) -> bool:
        """Whether the model is continued in parts: it follows from the model alone, as bytes do."""
        return 4 * sum(self._parameters) > RESIDENT_BYTES

    def split(self, unit: WorkUnit, packs: Sequence[WorkUnit], outer: Sequence[WorkUnit]) -> WorkUnit:
        """Return the unit that continues all prompts, reading what parts of the model made of them token by token.

        Args:
            unit: Continues the prompts with the whole model.
            packs: The variant's blocks; none for the source.
            outer: What lies outside the blocks, of the variant; none for the source.
        """
        parts = self._parts()
        ends: list[WorkUnit] = []
        for prompt in unit.params["prompts"]:
            last: tuple[WorkUnit, ...] = ()
            for step in range(unit.params["max_tokens"]):
                for number, part in enumerate(parts):
                    own = [*packs[part[0] : part[1]], *(outer if number in (0, len(parts) - 1) else ())]
                    last = (self._step(unit, prompt, step, number, part, [*last, *own]),)
            ends += last
        params = {**unit.params, "is_split": True}
        return replace(unit, params=params, needs=tuple(ends), cost=self.costs.rates.unit_s)

    def _parts(self) -> list[Part]:
        parts: list[Part] = []
        first = size = 0
        for block, parameters in enumerate(self._parameters):
            own = self.costs.rates.weight_size * parameters
            if block > first and size + own > self.costs.rates.resident_bytes:
                parts.append((first, block))
                first, size = block, 0
            size += own
        return [*parts, (first, self._num_blocks)]

    def _step(
        self, unit: WorkUnit, prompt: str, step: int, number: int, part: Part, reads: Sequence[WorkUnit]
    ) -> WorkUnit:
        """Return the unit that takes a prompt through the ``number``-th part for the token ``step``."""
        place = {"prompt": prompt, "step": step, "first": part[0], "last": part[1]}
        params = {**place, "of": unit.key, "quantization_config": unit.params["quantization_config"]}
        parameters = sum(self._parameters[part[0] : part[1]])
        return WorkUnit(
            Kind.CONTINUE,
            self.keys.key(Kind.CONTINUE, {"of": unit.key, **place}),
            params,
            tuple(reads),
            is_durable=False,
            home=f"continue:{unit.variant or 'source'}:{number}",
            rank=unit.rank,
            cost=self.costs.continue_s(parameters, PROMPT_TOKENS),
            out_bytes=4.0 * PROMPT_TOKENS * self.keys.outline.groups[0][0].in_features,
            variant=unit.variant,
        )
