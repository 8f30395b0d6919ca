"""Keys of work units: the fingerprint of everything that affects an output, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

from pipeline.fingerprint import fingerprint
from pipeline.graph.dag import Kind, Stored
from pipeline.graph.shape import ModelShape
from pipeline.graph.stages import ALGORITHM_VERSIONS
from pipeline.precision import Precision

COMPUTE_PACKAGES = ("torch", "transformers", "compressed-tensors", "numba")
"""Packages whose version can change bytes; with Bitmill's own they are named on the card."""

DEVICES = {"cpu": "cpu", "cuda": "cuda, loops 3"}
"""What kinds of devices are called in keys: changed when loops for one of them sum in another order. The version of
Triton follows from torch's, which is in the keys."""

KEY_SCHEME = 2
"""Part of every key: raised when something else than before identifies what a unit reads."""

IGNORED_CONFIG_KEYS = {
    "transformers_version": (
        "says who wrote the file; transformers looks whether it is there, which stays in the key, and at its value in "
        "one tokenizer: tokens are in keys themselves, and what has a tokenizer has config.json as it is in its key"
    ),
    "_name_or_path": "says where the model was when the file was written; it is read from another place now",
}
"""Keys of config.json, outermost ones only, whose values affect no computation, each with the reason. When in doubt a
key is not listed: dtypes decide the arithmetic of some classes, ``architectures`` may choose the class."""

HIDDEN_STAGE = "hidden"
"""Folder of the work store for hidden states that are saved every few blocks."""


@dataclass(frozen=True)
class Keyring:
    """Makes keys for one source on one kind of device.

    Attributes:
        outline: The source without weights.
        digests: SHA-256 of each needed source file by path.
        device: ``cpu`` or ``cuda``.
        precision: Of passes over text.
    """

    outline: ModelShape
    digests: Mapping[str, str]
    device: str
    precision: Precision = Precision.BFLOAT16

    @cached_property
    def compute(self) -> dict[str, Any]:
        """What computes: versions, device kind, the model's config."""
        packages = {name: version(name) for name in COMPUTE_PACKAGES}
        config = fingerprint(computing_config(self.outline.config))
        return {"scheme": KEY_SCHEME, "packages": packages, "device": DEVICES[self.device], "config": config}

    def key(self, kind: Kind, identity: Mapping[str, Any]) -> str:
        """Return the key of a unit that is identified by its kind and ``identity``."""
        stage = {"kind": kind, "version": ALGORITHM_VERSIONS[kind]}
        return fingerprint({**stage, "compute": self.compute, "identity": dict(identity)})

    def saved(self, chain: str, number: int) -> Stored:
        """Return where a slice's hidden states are saved that have come as far as ``chain`` says."""
        return Stored(HIDDEN_STAGE, fingerprint({"chain": chain, "slice": number}))

    def places(self, names: Iterable[str]) -> dict[str, Any]:
        """Return what identifies tensors: the digest of their file and where they lie in it."""
        found = {}
        for name in sorted(names):
            file, entry = self.outline.index.entries[name]
            found[name] = [self.digests[file], entry.start_bytes, entry.end_bytes]
        return found

    @cached_property
    def outer_names(self) -> list[str]:
        """Checkpoint tensors outside the blocks, extras included."""
        return [*self.outline.skeleton.outer_tensors().values(), *self.outline.skeleton.extra_names]

    @cached_property
    def embedding(self) -> Mapping[str, str]:
        """Checkpoint names by model name of what the hidden states that enter the first block follow from."""
        return self.outline.skeleton.embedding_tensors()

    def block_names(self, block: int) -> list[str]:
        """Checkpoint tensors of one block."""
        return list(self.outline.skeleton.block_tensors(block).values())

    def block_parameters(self, block: int) -> int:
        """Elements of one block's tensors."""
        return sum(self.outline.tensor_elements(name) for name in self.block_names(block))


def computing_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without the values that affect no computation."""
    return {key: None if key in IGNORED_CONFIG_KEYS else value for key, value in config.items()}
