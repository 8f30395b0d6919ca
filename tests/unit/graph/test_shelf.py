"""What a worker keeps: how much in memory, what goes first, and that it comes back as it was."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import StorageError
from pipeline.graph import shelf as shelf_module
from pipeline.graph.parts import Part, join_parts
from pipeline.graph.shelf import Shelf, Tensors
from tests.small_disk import small_disk

KILO = 1000


def tensors(seed: int, num_bytes: int = KILO) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(num_bytes // 4, generator=generator)}


def make(folder: Path, max_bytes: int) -> Shelf:
    return Shelf(max_bytes, folder / "spill", "cpu")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def same_bits(found: Tensors | None, expected: Tensors) -> bool:
    assert found is not None
    assert found.keys() == expected.keys()
    return all(
        found[name].dtype is tensor.dtype
        and found[name].shape == tensor.shape
        and torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        for name, tensor in expected.items()
    )


def test_what_is_put_is_there_until_it_is_dropped(tmp_path: Path) -> None:
    shelf = make(tmp_path, 10 * KILO)
    shelf.put("a", tensors(0))
    assert same_bits(shelf.get("a"), tensors(0))
    assert shelf.get("b") is None
    shelf.drop(["a", "never"])
    assert shelf.get("a") is None
    assert files(tmp_path) == []


def test_nothing_is_spilled_within_the_budget(tmp_path: Path) -> None:
    shelf = make(tmp_path, 3 * KILO)
    for number in range(3):
        shelf.put(str(number), tensors(number))
    assert (shelf.num_spilled, files(tmp_path)) == (0, [])


def test_the_least_recently_used_is_spilled_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    shelf = make(tmp_path, 2 * KILO)
    shelf.put("a", tensors(0))
    shelf.put("b", tensors(1))
    shelf.get("a")
    shelf.put("c", tensors(2))
    assert files(tmp_path) == ["b.safetensors"]
    for number, key in enumerate("abc"):
        assert same_bits(shelf.get(key), tensors(number))
    shelf.put("d", tensors(3))
    assert files(tmp_path) == ["a.safetensors", "b.safetensors"]
    assert shelf.num_spilled == 2


def test_every_dtype_shape_and_bit_survives_the_disk(tmp_path: Path) -> None:
    odd = {
        "0.second_moment": torch.tensor([[-0.0, float("nan")], [float("inf"), 1e-45]]),
        "half": torch.randn(3, 5, dtype=torch.bfloat16),
        "double": torch.randn(2, 2, dtype=torch.float64).t(),
        "codes": torch.arange(7, dtype=torch.uint8),
        "order": torch.tensor([3, 1, 2]),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 4),
    }
    shared = torch.arange(6.0)
    odd |= {"first": shared[:3], "whole": shared}
    shelf = make(tmp_path, 0)
    shelf.put("odd", odd)
    assert files(tmp_path) == ["odd.safetensors"]
    assert same_bits(shelf.get("odd"), odd)


def test_what_is_larger_than_the_budget_goes_to_disk_at_once(tmp_path: Path) -> None:
    shelf = make(tmp_path, KILO)
    shelf.put("small", tensors(1))
    shelf.put("large", tensors(0, 5 * KILO))
    assert files(tmp_path) == ["large.safetensors", "small.safetensors"]
    assert shelf.memory_bytes == 0
    assert same_bits(shelf.get("large"), tensors(0, 5 * KILO))


def test_room_is_made_by_dropping_copies_only(tmp_path: Path) -> None:
    shelf = make(tmp_path, 4 * KILO)
    shelf.put("own", tensors(0))
    shelf.put("copy", tensors(1), is_copy=True)
    shelf.put("newer copy", tensors(2), is_copy=True)
    assert shelf.make_room_for(2 * KILO) == 2 * KILO
    assert shelf.get("copy") is None
    assert same_bits(shelf.get("newer copy"), tensors(2))
    assert shelf.make_room_for(9 * KILO) == 3 * KILO
    assert same_bits(shelf.get("own"), tensors(0))
    assert shelf.num_spilled == 0


def test_what_is_read_in_turns_stays_as_far_as_there_is_room(tmp_path: Path) -> None:
    shelf = make(tmp_path, 4 * KILO)
    shelf.put("own", tensors(9))
    shelf.put("copy", tensors(8), is_copy=True)
    hits = []
    for _ in range(3):
        for number in range(5):
            found = shelf.get(f"block {number}")
            hits.append(found is not None)
            if found is None:
                shelf.keep(f"block {number}", tensors(number))
    # Three of five fit beside the worker's own output: dropping the one that was read longest ago would keep none.
    assert hits == [*5 * [False], *2 * [True, True, True, False, False]]
    assert shelf.get("copy") is None
    # The worker's own outputs take the room back, and nothing is written to disk for the sake of a block.
    shelf.put("own too", tensors(7))
    assert [shelf.get(f"block {number}") is not None for number in range(3)] == [True, True, False]
    assert same_bits(shelf.get("own"), tensors(9))
    assert (shelf.num_spilled, files(tmp_path)) == (0, [])


def test_copies_have_a_budget_of_their_own(tmp_path: Path) -> None:
    shelf = Shelf(10 * KILO, tmp_path / "spill", "cpu", 2 * KILO)
    shelf.put("own", tensors(0))
    for number in range(3):
        shelf.put(f"copy {number}", tensors(number), is_copy=True)
    assert [shelf.get(f"copy {number}") is not None for number in range(3)] == [False, True, True]
    assert shelf.memory_bytes == 3 * KILO


def test_copies_are_dropped_before_anything_is_spilled(tmp_path: Path) -> None:
    shelf = make(tmp_path, 3 * KILO)
    shelf.put("own", tensors(0))
    shelf.put("copy1", tensors(1), is_copy=True)
    shelf.put("copy2", tensors(2), is_copy=True)
    shelf.put("own2", tensors(3))
    assert shelf.get("copy1") is None
    assert same_bits(shelf.get("copy2"), tensors(2))
    assert (shelf.num_spilled, files(tmp_path)) == (0, [])
    shelf.put("own3", tensors(4, 2 * KILO))
    assert shelf.get("copy2") is None
    assert files(tmp_path) == ["own.safetensors"]


def test_a_copy_displaces_older_copies_and_nothing_else(tmp_path: Path) -> None:
    shelf = make(tmp_path, 3 * KILO)
    shelf.put("copy1", tensors(0), is_copy=True)
    shelf.put("own", tensors(1, 2 * KILO))
    shelf.put("copy2", tensors(2), is_copy=True)
    assert shelf.get("copy1") is None
    assert same_bits(shelf.get("copy2"), tensors(2))
    shelf.put("copy3", tensors(3, 2 * KILO), is_copy=True)
    assert shelf.get("copy2") is None
    assert shelf.get("copy3") is None, "there is room only if the worker's own output is written to disk"
    assert same_bits(shelf.get("own"), tensors(1, 2 * KILO))
    assert (shelf.num_spilled, files(tmp_path)) == (0, [])


def test_putting_a_key_again_replaces_it_in_memory_and_on_disk(tmp_path: Path) -> None:
    shelf = make(tmp_path, KILO)
    shelf.put("a", tensors(0))
    shelf.put("b", tensors(1))
    assert files(tmp_path) == ["a.safetensors"]
    shelf.put("a", tensors(2))
    assert files(tmp_path) == ["b.safetensors"]
    assert same_bits(shelf.get("a"), tensors(2))
    shelf.put("a", tensors(3))
    assert shelf.num_spilled == 2


def test_dropping_gives_back_memory_and_files(tmp_path: Path) -> None:
    shelf = make(tmp_path, 2 * KILO)
    for number in range(4):
        shelf.put(str(number), tensors(number))
    assert files(tmp_path) == ["0.safetensors", "1.safetensors"]
    shelf.drop(["0", "3"])
    assert files(tmp_path) == ["1.safetensors"]
    shelf.put("4", tensors(4))
    assert files(tmp_path) == ["1.safetensors"], "the memory of what was dropped is free again"
    shelf.drop(str(number) for number in range(5))
    assert files(tmp_path) == []
    assert [shelf.get(str(number)) for number in range(5)] == [None] * 5


def test_threads_see_whole_entries_or_none(tmp_path: Path) -> None:
    """Handing over runs beside the unit at hand: reads, spills and drops of the same entries meet."""
    shelf, rounds = make(tmp_path, 3 * KILO), 12
    expected = {str(number): tensors(number) for number in range(8)}
    wrong: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for key, whole in expected.items():
                found = shelf.get(key)
                if found is not None and not same_bits(found, whole):
                    wrong.append(key)

    def drop() -> None:
        while not stop.is_set():
            shelf.drop(["1", "5"])

    threads = [threading.Thread(target=read), threading.Thread(target=read), threading.Thread(target=drop)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        for key in expected:
            shelf.put(key, tensors(int(key)), is_copy=key == "7")
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert wrong == []
    assert shelf.num_spilled > 0
    shelf.drop(expected)
    assert files(tmp_path) == []


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        shelf = Shelf(0, disk / "spill", "cpu")
        with pytest.raises(StorageError, match=r"large\.safetensors") as caught:
            shelf.put("large", tensors(0, 3 << 20))
    assert caught.value.code == "storage.full"


@pytest.mark.parametrize("max_bytes", [10 * KILO, 0], ids=["in memory", "on disk"])
def test_parts_of_an_output_are_its_tensors(tmp_path: Path, max_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "PART_BYTES", 100)
    random = torch.Generator().manual_seed(0)
    put = {
        "sums.0.square": torch.randn(12, 12, generator=random),
        "sums.0.count": torch.tensor(7),
        "sums.1.square": torch.randn(3, 4, generator=random).bfloat16(),
        "hidden.0": torch.randn(5, generator=random),
    }
    shelf = make(tmp_path, max_bytes)
    shelf.put("a", put)
    assert shelf.num_spilled == (max_bytes == 0)
    for prefix in ("", "sums.0.", "hidden.", "none."):
        parts: list[Part] = []

        def ask(number: int, prefix: str = prefix, parts: list[Part] = parts) -> Part:
            part = shelf.part("a", prefix, number)
            assert part is not None
            parts.append(part)
            return part

        joined = join_parts(ask)
        assert same_bits(joined, {name: tensor for name, tensor in put.items() if name.startswith(prefix)})
        assert all(sum(rows.data.nbytes for rows in part.rows) <= 100 for part in parts)
    assert shelf.part("b", "", 0) is None


def test_what_is_read_in_turns_takes_no_more_than_is_to_spare(tmp_path: Path) -> None:
    spare = 2 * KILO
    shelf = Shelf(10 * KILO, tmp_path / "spill", "cpu", spare_bytes=lambda wanted: min(wanted, spare))
    shelf.put("copy", tensors(0), is_copy=True)
    assert shelf.make_room_for(9 * KILO) == 2 * KILO
    assert shelf.get("copy") is not None, "there was room for what could be spared"
    shelf.keep("large", tensors(1, 3 * KILO))
    shelf.keep("small", tensors(2))
    assert shelf.get("large") is None
    assert shelf.get("small") is not None
    spare = 0
    shelf.keep("another", tensors(3))
    assert shelf.get("another") is None
