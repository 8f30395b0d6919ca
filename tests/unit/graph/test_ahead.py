"""Blocks that are fetched while another one is computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import CorruptWeightsError
from pipeline.graph.ahead import Ahead, Weights
from pipeline.graph.outline import Source, open_folder


class Blocks:
    """Reads blocks of one number each, and remembers in which threads."""

    def __init__(self) -> None:
        self.read: list[tuple[int, bool]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self, index: int) -> Weights:
        self.read.append((index, threading.current_thread() is threading.main_thread()))
        assert self.may_go_on.wait(10)
        if index == 13:
            raise CorruptWeightsError("block 13 holds NaN")
        return {"weight": torch.tensor([float(index)])}


@pytest.fixture
def blocks() -> Blocks:
    return Blocks()


@pytest.fixture
def ahead(blocks: Blocks) -> Iterator[Ahead]:
    made = Ahead(blocks, "cpu")
    yield made
    blocks.may_go_on.set()
    made.close()


def number(found: Weights | None) -> float:
    """Return the number of a block that has to be there."""
    assert found is not None
    return float(found["weight"])


def test_a_block_that_was_expected_is_read_once_by_another_thread(ahead: Ahead, blocks: Blocks) -> None:
    assert ahead.get(3) is None, "nobody expected it"
    ahead.expect(3)
    ahead.expect(3)
    assert number(ahead.get(3)) == 3.0
    assert blocks.read == [(3, False)]


def test_text_that_passes_block_after_block_in_two_spans_finds_each(ahead: Ahead, blocks: Blocks) -> None:
    """The next block is expected before the one at work is asked for, and what is asked for is used up."""
    found = []
    for index in range(5):
        for _ in range(2):
            ahead.expect(index + 1)
            weights = ahead.get(index)
            found.append(None if weights is None else float(weights.pop("weight")))
    assert found == [None, None, 1, 1, 2, 2, 3, 3, 4, 4]
    assert number(ahead.get(5)) == 5.0
    assert blocks.read == [(index, False) for index in (1, 2, 3, 4, 5)]


def test_a_block_is_waited_for_and_another_one_is_not(ahead: Ahead, blocks: Blocks) -> None:
    blocks.may_go_on.clear()
    ahead.expect(3)
    assert ahead.get(4) is None
    threading.Timer(0.1, blocks.may_go_on.set).start()
    assert number(ahead.get(3)) == 3.0


def test_a_block_that_nobody_asks_for_is_let_go_of(ahead: Ahead) -> None:
    for index in (3, 4, 5):
        ahead.expect(index)
    assert ahead.get(3) is None
    assert number(ahead.get(4)) == 4.0
    assert number(ahead.get(5)) == 5.0
    ahead.expect(1)  # another chain
    assert ahead.get(5) is None


def test_what_reading_raises_is_told_to_whoever_asks_for_the_block(ahead: Ahead, blocks: Blocks) -> None:
    ahead.expect(13)
    with pytest.raises(CorruptWeightsError, match="block 13 holds NaN"):
        ahead.get(13)
    assert ahead.get(13) is None
    ahead.expect(13)
    with pytest.raises(CorruptWeightsError, match="block 13 holds NaN"):
        ahead.get(13)
    assert len(blocks.read) == 2


@pytest.fixture
def source(llama: Path) -> Source:
    """A source whose blocks are read ahead, as on an accelerator, though they stay where they are."""
    opened = replace(open_folder(llama))
    vars(opened)["ahead"] = Ahead(opened.block, "cpu")
    return opened


def test_a_source_gives_the_same_block_whether_it_was_expected_or_not(source: Source) -> None:
    plain = source.block_to_pass(1)
    source.expect_block(1)
    expected = source.block_to_pass(1)
    assert expected.keys() == plain.keys()
    assert all(torch.equal(expected[name], plain[name]) for name in plain)
    source.expect_block(source.outline.skeleton.num_blocks)  # there is none
    source.close()


def test_on_a_cpu_blocks_are_not_read_by_a_thread(llama: Path) -> None:
    assert open_folder(llama).ahead is None
