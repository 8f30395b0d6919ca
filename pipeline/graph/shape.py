"""What a plan needs to know of a model: names, sizes and groups of tensors. No weights, no module.

``Outline`` is one that was read from a config and headers, ``shapes.py`` has some of well-known models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipeline.skeleton.groups import LinearGroup
from pipeline.spec import ExpertStatistics
from pipeline.tensors.index import WeightIndex


class SkeletonShape(Protocol):
    """Where a model's tensors belong; see ``Skeleton``."""

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        ...

    @property
    def architecture(self) -> str:
        """Name of the transformers class."""
        ...

    @property
    def block_names(self) -> Sequence[str]:
        """Names of the decoder blocks in order."""
        ...

    @property
    def extra_names(self) -> Sequence[str]:
        """Checkpoint tensors that the model has no use for."""
        ...

    @property
    def carried_size(self) -> int:
        """Numbers of each token that go from block to block beside its hidden state."""
        ...

    def block_tensors(self, index: int) -> Mapping[str, str]:
        """Return checkpoint names by the names local to one block."""
        ...

    def outer_tensors(self) -> Mapping[str, str]:
        """Return checkpoint names by model name for everything outside the blocks."""
        ...

    def embedding_tensors(self) -> Mapping[str, str]:
        """Return those of them that the hidden states entering the first block follow from."""
        ...


class ModelShape(Protocol):
    """A model as far as its conversion can be planned from it; see ``Outline``."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Contents of config.json, or what is known of it."""
        ...

    @property
    def index(self) -> WeightIndex:
        """Where every tensor lies."""
        ...

    @property
    def skeleton(self) -> SkeletonShape:
        """Where every tensor belongs."""
        ...

    @property
    def groups(self) -> Sequence[Sequence[LinearGroup]]:
        """The linear groups of each block."""
        ...

    @property
    def experts(self) -> ExpertStatistics:
        """Which tokens the statistics of experts are of."""
        ...

    @property
    def other_linears(self) -> Sequence[str]:
        """Names of linears that no variant quantizes."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Number of logits of one position."""
        ...

    def tensor_bytes(self, name: str) -> int:
        """Return the stored size of one tensor."""
        ...

    def tensor_elements(self, name: str) -> int:
        """Return the number of elements of one tensor."""
        ...


def state_size(outline: ModelShape) -> int:
    """Return the numbers of each token that go from block to block."""
    # What enters the linears that a block calls first is as wide as what enters the block.
    hidden = next(group.in_features for block in outline.groups for group in block)
    return hidden + outline.skeleton.carried_size


EXPERTS_PER_TOKEN = "num_experts_per_tok"
"""Key of config.json that says how many experts a token is sent to."""


def active_elements(outline: ModelShape, block: int) -> float:
    """Return the elements of a block's tensors that a token passes: of experts, those that it is sent to."""
    num_all = sum(outline.tensor_elements(name) for name in outline.skeleton.block_tensors(block).values())
    linears = [linear for group in outline.groups[block] for linear in group.linears if linear.expert]
    num_experts = len({linear.expert for linear in linears})
    config = outline.config
    per_token = config.get(EXPERTS_PER_TOKEN) or (config.get("text_config") or {}).get(EXPERTS_PER_TOKEN)
    if not num_experts or not per_token:
        return num_all
    left = 1 - min(int(per_token), num_experts) / num_experts
    return num_all - left * sum(linear.out_features * linear.in_features for linear in linears)
