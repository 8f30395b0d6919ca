"""A source without its weights: headers, skeleton, linear groups, and what identifies its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import SourceError, SourceNotFoundError, UnsupportedArchitectureError
from pipeline.skeleton.groups import LinearGroup, is_linear, linear_groups
from pipeline.skeleton.limits import vocabulary_size
from pipeline.skeleton.model import Skeleton
from pipeline.strict_json import parse_json_object
from pipeline.tensors.index import WeightIndex
from pipeline.tensors.local import read_folder_index
from pipeline.tensors.reader import FileStamp, check_finite, read_tensors

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""Stored dtypes (as safetensors headers name them) that weights may have."""


@dataclass(frozen=True)
class Outline:
    """A model as its config and its headers describe it.

    Attributes:
        config: Contents of config.json.
        index: Where every tensor lies.
        skeleton: The model without weights, bound to the index's names.
        groups: The linear groups of each block.
    """

    config: Mapping[str, Any]
    index: WeightIndex
    skeleton: Skeleton
    groups: tuple[tuple[LinearGroup, ...], ...]

    @property
    def linear_names(self) -> frozenset[str]:
        """Names of all linears that a variant may quantize."""
        return frozenset(linear.name for block in self.groups for group in block for linear in group.linears)

    @property
    def other_linears(self) -> tuple[str, ...]:
        """Names of linears that no variant quantizes: those outside the blocks and those that no block calls, under
        the model's name and the checkpoint's where they differ."""
        known = self.linear_names
        names = self.skeleton.names
        found = []
        for name, module in self.skeleton.net.named_modules():
            stored = names.get(name + ".weight", name + ".weight").removesuffix(".weight")
            if is_linear(module) and stored not in known:
                found += [name, stored]
        return tuple(dict.fromkeys(found))

    @property
    def vocabulary_size(self) -> int:
        """Number of logits of one position."""
        return vocabulary_size(self.skeleton)

    def tensor_bytes(self, name: str) -> int:
        """Return the stored size of one tensor."""
        return self.index.entries[name][1].num_bytes

    def tensor_elements(self, name: str) -> int:
        """Return the number of elements of one tensor."""
        return self.index.entries[name][1].num_elements


def make_outline(folder: Path, index: WeightIndex, device: str = "cpu") -> Outline:
    """Return the outline of the model whose config.json is in ``folder``.

    Raises:
        SourceError: when config.json cannot be read, the source is quantized already, or its names or shapes do not
            belong to the configured model.
        UnsupportedArchitectureError: when the model cannot be run block by block.
    """
    config = _read_config(folder)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise SourceError(
            f"the source is already quantized ({method})",
            code="source.quantized",
            hint="convert the 16-bit model that it was made from",
        )
    odd = sorted({entry.dtype for _, entry in index.entries.values() if entry.dtype.startswith("F8")})
    if odd:
        raise UnsupportedArchitectureError(
            f"the source stores weights as {', '.join(odd)}; only {', '.join(FLOAT_DTYPES)} are converted",
            hint="convert a 16-bit version of the model",
        )
    skeleton = Skeleton(folder, device)
    skeleton.bind({name: entry.shape for name, (_, entry) in index.entries.items()})
    groups = tuple(linear_groups(skeleton, block) for block in range(skeleton.num_blocks))
    if not any(groups):
        raise UnsupportedArchitectureError(f"no block of {skeleton.architecture} has a linear layer")
    return Outline(config, index, skeleton, groups)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return parse_json_object((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(
            f"config.json of {folder.name} cannot be read: {error}",
            code="source.config",
            hint="fetch the source again, or check the folder",
        ) from error


@dataclass(frozen=True)
class Source:
    """A source whose files are local: its outline and its weights, read by range when asked for.

    Attributes:
        folder: Where the files are.
        outline: What they hold.
        stamps: What each weights file was when its digest was taken.
    """

    folder: Path
    outline: Outline
    stamps: Mapping[str, FileStamp]
    _finite: set[str] = field(default_factory=set)

    def block(self, index: int, local_names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return one block's checkpoint tensors by local name (default: all), on the CPU, checked to be finite."""
        names = self.outline.skeleton.block_tensors(index)
        return self.read({local: names[local] for local in (names if local_names is None else local_names)})

    def outer(self) -> dict[str, Tensor]:
        """Return the checkpoint's tensors outside the blocks by model name, on the CPU, checked to be finite."""
        return self.read(self.outline.skeleton.outer_tensors())

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Return checkpoint tensors (values of ``names``) by the keys of ``names``.

        Raises:
            CorruptWeightsError: when one holds NaN or Inf, or its file is not what its digest was taken of.
        """
        tensors = read_tensors(self.folder, self.outline.index, names.values(), self.stamps)
        for name, tensor in tensors.items():
            if name not in self._finite:  # what the stamps say is unchanged need not be looked at again
                check_finite(name, tensor)
                self._finite.add(name)
        return {key: tensors[name] for key, name in names.items()}


def open_folder(folder: Path, device: str = "cpu", stamps: Mapping[str, FileStamp] | None = None) -> Source:
    """Return the source in a local folder, whose weights must be what ``stamps`` say (default: what they are now).

    Raises:
        SourceError: as ``make_outline`` and ``read_folder_index``.
    """
    index = read_folder_index(folder)
    return Source(folder, make_outline(folder, index, device), stamps or stamp_files(folder, index.files))


def stamp_files(folder: Path, paths: Iterable[str]) -> dict[str, FileStamp]:
    """Return what files are now, as far as it shows without reading them.

    Raises:
        SourceNotFoundError: when one is gone.
    """
    try:
        return {path: FileStamp.of((folder / path).stat()) for path in paths}
    except OSError as error:
        raise SourceNotFoundError(
            f"{error.filename} cannot be read: {error.strerror}",
            code="source.unreadable",
            hint="check the file and its permissions",
        ) from error
