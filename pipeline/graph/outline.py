"""A source without its weights: headers, skeleton, linear groups, and what identifies its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pipeline.errors import (
    CorruptWeightsError,
    SourceError,
    SourceNotFoundError,
    StorageError,
    UnsupportedArchitectureError,
)
from pipeline.fingerprint import fingerprint
from pipeline.graph.ahead import Ahead
from pipeline.graph.dag import Kind, Stored
from pipeline.hub.fetch import fetch
from pipeline.hub.source import Source as HubSource
from pipeline.hub.source import range_reader
from pipeline.settings import Settings
from pipeline.skeleton.experts import find_routers
from pipeline.skeleton.groups import LinearGroup, linear_groups
from pipeline.skeleton.limits import vocabulary_size
from pipeline.skeleton.model import PROBE_TOKENS, Skeleton
from pipeline.skeleton.modules import is_linear
from pipeline.spec import ExpertStatistics
from pipeline.storage.file_cache import FileCache
from pipeline.storage.work import NONDETERMINISTIC, WorkStore
from pipeline.strict_json import parse_json_object
from pipeline.tensors.index import WeightIndex, read_index
from pipeline.tensors.local import LocalTensors, read_folder_index
from pipeline.tensors.reader import FileStamp, check_finite
from pipeline.tensors.streamed import MISMATCH, StreamedTensors

WEIGHTS_STAGE = "weights"
"""Folder of the work store for the digests of streamed tensors."""

PROOF_VERSION = 1
"""Raised when the summary of a proof changes."""

RANGES_FOLDER = "ranges"
"""Folder of the cache directory for streamed weights."""

RANGES_BYTES = 16_000_000_000
"""Disk of one machine for streamed weights."""

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""Stored dtypes (as safetensors headers name them) that weights may have."""


@dataclass(frozen=True)
class Outline:
    """A model as its config and its headers describe it.

    Attributes:
        config: Contents of config.json.
        index: Where every tensor lies; experts that share one are tensors of their own.
        skeleton: The model without weights, bound to the index's names.
        groups: The linear groups of each block.
        experts: Which tokens the statistics of experts are of, which decides what they share.
    """

    config: Mapping[str, Any]
    index: WeightIndex
    skeleton: Skeleton
    groups: tuple[tuple[LinearGroup, ...], ...]
    experts: ExpertStatistics = ExpertStatistics.ALL

    @property
    def linear_names(self) -> frozenset[str]:
        """Names of all linears that a variant may quantize."""
        return frozenset(linear.name for block in self.groups for group in block for linear in group.linears)

    @property
    def other_linears(self) -> tuple[str, ...]:
        """Names of linears that no variant quantizes: those outside the blocks, those that no block calls, and routers
        of experts, under the model's name and the checkpoint's where they differ."""
        known = self.linear_names
        names = self.skeleton.names
        found = []
        routers = {
            f"{path}.{router}"
            for block, path in enumerate(self.skeleton.block_names)
            for router in find_routers(self.skeleton.block(block))
        }
        for name, module in self.skeleton.net.named_modules():
            stored = names.get(name + ".weight", name + ".weight").removesuffix(".weight")
            if (is_linear(module) or name in routers) and stored not in known:
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


def make_outline(
    folder: Path, index: WeightIndex, device: str = "cpu", experts: ExpertStatistics = ExpertStatistics.ALL
) -> Outline:
    """Return the outline of the model whose config.json is in ``folder``.

    Args:
        folder: Of the source.
        index: Where its tensors are.
        device: ``cpu`` or ``cuda``.
        experts: Which tokens the statistics of experts are of.

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
    index = index.cut(skeleton.fused_parts({name: entry.shape for name, (_, entry) in index.entries.items()}))
    skeleton.bind({name: entry.shape for name, (_, entry) in index.entries.items()})
    try:
        skeleton.find_carried()
        groups = tuple(linear_groups(skeleton, block, experts) for block in range(skeleton.num_blocks))
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Raised by the model's own code, on tensors without content.
        raise UnsupportedArchitectureError(
            f"blocks of {skeleton.architecture} cannot be tried on {PROBE_TOKENS} tokens without weights: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
            hint="this architecture is not supported yet; see docs/reference/architectures.md",
        ) from error
    if not any(groups):
        raise UnsupportedArchitectureError(f"no block of {skeleton.architecture} has a linear layer")
    return Outline(config, index, skeleton, groups, experts)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return parse_json_object((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(
            f"config.json of {folder.name} cannot be read: {error}",
            code="source.config",
            hint="fetch the source again, or check the folder",
        ) from error


class Tensors(Protocol):
    """The tensors of a source, wherever they are."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors on the CPU, in fresh memory of their own."""

    def expect(self, names: Iterable[str]) -> None:
        """Prepare to read these soon."""

    def digest_tensors(self, file: str) -> tuple[str, dict[str, str]]:
        """Return the SHA-256 of a whole file and of each of its tensors."""

    def forget(self, file: str) -> None:
        """Read a file anew from its source from now on."""

    def close(self) -> None:
        """Stop what runs in the background."""


@dataclass(frozen=True)
class Source:
    """A source: its outline, its companion files, and its weights, read by range when asked for.

    Attributes:
        folder: Where the companion files are.
        outline: What it holds.
        weights: Its tensors.
        device: Where blocks are computed.
    """

    folder: Path
    outline: Outline
    weights: Tensors
    device: str = "cpu"
    _finite: set[str] = field(default_factory=set)

    @cached_property
    def ahead(self) -> Ahead | None:
        """What brings blocks to an accelerator; None where they are computed where they are read."""
        return None if self.device == "cpu" else Ahead(self.block, self.device)

    def block(self, index: int, local_names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return one block's checkpoint tensors by local name (default: all), on the CPU, checked to be finite."""
        names = self.outline.skeleton.block_tensors(index)
        return self.read({local: names[local] for local in (names if local_names is None else local_names)})

    def block_to_pass(self, index: int) -> dict[str, Tensor]:
        """Return one block's tensors as ``block`` does, on the device already when they were expected."""
        expected = self.ahead.get(index) if self.ahead is not None else None
        return self.block(index) if expected is None else expected

    def expect_block(self, index: int) -> None:
        """Prepare to have text pass a block soon; nothing where there is no such block."""
        if index >= self.outline.skeleton.num_blocks:
            return
        if self.ahead is not None:
            self.ahead.expect(index)
        else:
            self.weights.expect(self.outline.skeleton.block_tensors(index).values())

    def close(self) -> None:
        """Stop what runs in the background."""
        if self.ahead is not None:
            self.ahead.close()
        self.weights.close()

    def outer(self) -> dict[str, Tensor]:
        """Return the checkpoint's tensors outside the blocks by model name, on the CPU, checked to be finite."""
        return self.read(self.outline.skeleton.outer_tensors())

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Return checkpoint tensors (values of ``names``) by the keys of ``names``.

        Raises:
            CorruptWeightsError: when one holds NaN or Inf, or its file is not what its digest was taken of.
        """
        tensors = self.weights.read(names.values())
        for name, tensor in tensors.items():
            if name not in self._finite:  # what the stamps say is unchanged need not be looked at again
                check_finite(name, tensor)
                self._finite.add(name)
        return {key: tensors[name] for key, name in names.items()}


def open_folder(
    folder: Path,
    device: str = "cpu",
    stamps: Mapping[str, FileStamp] | None = None,
    experts: ExpertStatistics = ExpertStatistics.ALL,
) -> Source:
    """Return the source in a local folder, whose weights must be what ``stamps`` say (default: what they are now).

    Raises:
        SourceError: as ``make_outline`` and ``read_folder_index``.
    """
    outline = make_outline(folder, read_folder_index(folder), device, experts)
    index = outline.index
    weights = LocalTensors(folder, index, stamps or stamp_files(folder, index.files))
    return Source(folder, outline, weights, device)


def open_streamed(
    source: HubSource,
    settings: Settings,
    work: WorkStore,
    device: str = "cpu",
    experts: ExpertStatistics = ExpertStatistics.ALL,
) -> Source:
    """Return a source on a hub or in a bucket whose weights stay there: they are read by range, through a cache on this
    machine. The SHA-256 of the weights files are known.

    Raises:
        SourceError: as ``make_outline``, ``read_index`` and ``fetch``.
    """
    fetched = fetch(source, settings, with_weights=False)
    read_range, sizes = range_reader(source, settings), source.file_sizes
    files = {path: sizes[path] for path in sizes if path in fetched.digests}
    outline = make_outline(fetched.folder, read_index(files, read_range), device, experts)
    index = outline.index
    cache = FileCache(settings.cache_dir / RANGES_FOLDER, RANGES_BYTES, grace_s=0)
    groups, book = weight_groups(outline), WorkDigests(work, index, fetched.digests)
    weights = StreamedTensors(index, sizes, fetched.digests, read_range, cache, book, groups)
    return Source(fetched.folder, outline, weights, device)


def weight_groups(outline: Outline) -> list[list[str]]:
    """Return the checkpoint's tensors in groups that are read together: each block, and what is outside the blocks."""
    skeleton = outline.skeleton
    blocks = [list(skeleton.block_tensors(block).values()) for block in range(skeleton.num_blocks)]
    inside = {name for names in blocks for name in names}
    return [*blocks, [name for name in outline.index.entries if name not in inside]]


def proof_place(sha256: str) -> Stored:
    """Return where it is stored what a weights file with this digest holds, once one was read from end to end."""
    return Stored(Kind.VERIFY.value, fingerprint([Kind.VERIFY.value, PROOF_VERSION, sha256]))


class WorkDigests:
    """SHA-256 of streamed tensors, written down in the work store for all workers."""

    def __init__(self, work: WorkStore, index: WeightIndex, digests: Mapping[str, str]) -> None:
        """Use a work store for the tensors of ``index``, whose files have the announced ``digests``."""
        self._work, self._index, self._digests = work, index, digests

    def known(self, key: str, names: Sequence[str]) -> Mapping[str, str] | None:
        """Return what was written down for a group, else what its files are proven to hold, else None."""
        record = self._work.lookup(WEIGHTS_STAGE, key)
        if record is not None:
            return dict(record.summary["sha256"])
        files = sorted({self._index.entries[name][0] for name in names})
        proofs = self._work.lookup_all([proof_place(self._digests[file]) for file in files])
        if len(proofs) < len({self._digests[file] for file in files}):
            return None
        proven = {file: proofs[proof_place(self._digests[file])].summary["tensors"] for file in files}
        return {name: proven[self._index.entries[name][0]][name] for name in names}

    def write_down(self, key: str, digests: Mapping[str, str]) -> None:
        """Write down a group that was read for the first time.

        Raises:
            CorruptWeightsError: when somebody else has just written down something else.
        """
        try:
            with self._work.writing(WEIGHTS_STAGE, key) as writer:
                writer.finish({"sha256": dict(digests)})
        except StorageError as error:
            if error.code != NONDETERMINISTIC:
                raise
            raise CorruptWeightsError(
                f"two workers read different bytes of {', '.join(sorted(digests)[:3])}, ...",
                code=MISMATCH,
                hint="run the command again; if it stays so, check any proxy or mirror between, or leave out --stream",
            ) from error


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
