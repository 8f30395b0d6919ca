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
