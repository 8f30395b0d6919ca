"""Laws of headers and files: no bytes crash the reader, and what is written comes back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CorruptWeightsError
from pipeline.tensors.dtypes import ITEM_BITS
from pipeline.tensors.header import parse_header, read_header
from pipeline.tensors.index import read_index
from pipeline.tensors.reader import read_tensors
from pipeline.tensors.writer import write_safetensors

sizes = st.one_of(st.integers(-2, 20), st.integers(), st.floats(), st.booleans(), st.none())
plausible = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(sorted(ITEM_BITS)), st.text(max_size=4)),
        "shape": st.lists(sizes, max_size=4),
        "data_offsets": st.lists(sizes, max_size=3),
    }
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=5))
headers = st.dictionaries(names, plausible | anything, max_size=4)


def accepted(data: bytes, file_bytes: int) -> bool:
    try:
        header = parse_header(data, file_bytes, "fuzz")
    except CorruptWeightsError:
        return False
    # Whatever is accepted tiles the file: no tensor can make a reader allocate more than is there.
    position = header.header_bytes
    for entry in header.entries.values():
        assert entry.start_bytes == position
        assert entry.num_elements * ITEM_BITS[entry.dtype] == 8 * entry.num_bytes
        position = entry.end_bytes
    assert position == file_bytes
    return True


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**64))
def test_no_bytes_crash_the_parser(data: bytes, file_bytes: int) -> None:
    accepted(data, len(data))
    accepted(data, file_bytes)


@settings(max_examples=400, deadline=None)
@given(headers, st.integers(0, 40), st.integers(-3, 3))
def test_no_json_crashes_the_parser(header: dict[str, Any], data_bytes: int, lie: int) -> None:
    text = json.dumps(header).encode()
    accepted(max(len(text) + lie, 0).to_bytes(8, "little") + text + b"\0" * data_bytes, 8 + len(text) + data_bytes)


def good_file() -> bytes:
    header = {
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "U8", "shape": [5], "data_offsets": [12, 17]},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(17)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_good_file_is_refused_or_still_consistent(data: st.DataObject) -> None:
    content = bytearray(good_file())
    assert accepted(bytes(content), len(content))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    accepted(bytes(content), len(content))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(good_file()) - 1))
def test_every_truncation_is_refused(size: int) -> None:
    assert not accepted(good_file()[:size], size)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=8, max_size=64), st.integers(0, 2**64))
def test_reads_never_go_beyond_the_file(data: bytes, claimed: int) -> None:
    file_bytes = max(claimed, len(data))

    def read(path: str, start: int, end: int) -> bytes:
        assert 0 <= start <= end <= file_bytes
        return data[start:end]

    try:
        read_header(read, "fuzz", file_bytes)
    except CorruptWeightsError:
        return


dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.float8_e4m3fn])
shapes = st.lists(st.integers(0, 5), max_size=3)
texts = st.dictionaries(st.text(max_size=6).filter(lambda t: t != "format" and t.isprintable()), st.text(max_size=6))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.tuples(dtypes, shapes), min_size=1, max_size=5), texts
)
def test_what_is_written_comes_back(
    described: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 100, shape, generator=generator).to(dtype) for name, (dtype, shape) in described.items()
    }
    encodable = {k: v for k, v in metadata.items() if (k + v).encode("utf-8", "ignore").decode() == k + v}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_safetensors(path, tensors, encodable)
        content = path.read_bytes()
        assert parse_header(content, len(content), "x").metadata == {"format": "pt", **encodable}
        back = read_tensors(Path(folder), read_index({path.name: len(content)}, lambda p, s, e: content[s:e]), tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype is tensor.dtype
        assert back[name].shape == tensor.shape
        assert back[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()
