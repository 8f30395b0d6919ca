"""Which units must run, and in what order."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping

from pipeline.fingerprint import fingerprint
from pipeline.graph.dag import Kind, Stored, WorkUnit, open_needs, reachable_units, required_units


def unit(name: str, *needs: WorkUnit, stand_ins: Mapping[str, tuple[Stored, ...]] | None = None) -> WorkUnit:
    return WorkUnit(Kind.SOLVE, fingerprint(name), {}, needs, stand_ins=stand_ins or {}, label=name)


def names(units: Collection[WorkUnit]) -> list[str]:
    return [found.label for found in units]


def required(
    goals: Collection[WorkUnit], there: Collection[WorkUnit] = (), stored: Collection[Stored] = ()
) -> list[str]:
    return names(required_units(goals, lambda unit: unit in there, lambda place: place in stored))


A = unit("a")
B, C = unit("b", A), unit("c", A)
D = unit("d", B, C)
SAVED = (Stored("hidden", "0" * 64), Stored("hidden", "1" * 64))
E = unit("e", D, A, stand_ins={D.key: SAVED})


def test_needs_come_before_what_needs_them_and_once() -> None:
    assert required([D]) == ["a", "b", "c", "d"]


def test_goals_are_reached_in_the_order_in_which_they_are_asked_for() -> None:
    assert required([C, B]) == ["a", "c", "b"]
    assert required([B, C, B]) == ["a", "b", "c"]
    assert required([]) == []


def test_what_a_finished_unit_needed_is_not_looked_at() -> None:
    looked: list[str] = []

    def is_there(wanted: WorkUnit) -> bool:
        looked.append(wanted.label)
        return wanted is D

    assert required_units([D], is_there, lambda place: False) == []
    assert looked == ["d"]
    assert required([D, C], there=[D]) == ["a", "c"]


def test_a_finished_need_is_not_run_and_its_other_readers_are() -> None:
    assert required([D], there=[B]) == ["a", "c", "d"]
    assert required([D], there=[A]) == ["b", "c", "d"]


def test_a_need_is_passed_over_when_everything_that_stands_in_for_it_is_stored() -> None:
    assert required([E], stored=SAVED) == ["a", "e"]
    assert names(open_needs(E, lambda unit: False, lambda place: place in SAVED)) == ["a"]


def test_one_missing_place_is_enough_to_run_the_need() -> None:
    for place in SAVED:
        assert required([E], stored=[place]) == ["a", "b", "c", "d", "e"]
    assert required([E]) == ["a", "b", "c", "d", "e"]


def test_stand_ins_hold_for_their_reader_only() -> None:
    other = unit("other", D)
    assert required([E, other], stored=SAVED) == ["a", "e", "b", "c", "d", "other"]


def test_no_place_stands_in_for_nothing() -> None:
    empty = unit("empty", D, stand_ins={D.key: ()})
    assert required([empty]) == ["a", "b", "c", "d", "empty"]


def test_open_needs_are_those_that_are_not_there_in_order() -> None:
    assert names(open_needs(D, lambda unit: False, lambda place: False)) == ["b", "c"]
    assert names(open_needs(D, lambda unit: unit is B, lambda place: False)) == ["c"]
    assert names(open_needs(A, lambda unit: False, lambda place: False)) == []


def test_equal_keys_are_one_unit_whatever_object_they_are() -> None:
    again = unit("b", unit("a"))
    assert required([unit("x", B, again)]) == ["a", "b", "x"]


def test_reachable_units_are_all_of_them_once_whatever_is_stored() -> None:
    found = reachable_units([E, B])
    assert sorted(names(found)) == ["a", "b", "c", "d", "e"]
    assert reachable_units([]) == []


def test_a_long_chain_needs_no_deep_stack() -> None:
    last = unit("0")
    for number in range(1, 5000):
        last = unit(str(number), last)
    assert required([last]) == [str(number) for number in range(5000)]
    assert len(reachable_units([last])) == 5000


def test_a_unit_says_where_its_output_is_and_what_it_is() -> None:
    packed = WorkUnit(Kind.PACK, "0" * 64, {}, block=3, variant="gptq-w4-g64", label="q_proj")
    assert packed.place == Stored("pack", "0" * 64)
    assert packed.title == "pack of block 3, q_proj, gptq-w4-g64"
    assert WorkUnit(Kind.OUTER, "0" * 64, {}).title == "outer"
    assert pickle.loads(pickle.dumps(E)) == E
