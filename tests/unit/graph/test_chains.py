"""Hidden states on their way: how slices are cut, what is saved, and that no cut shows in a sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.fingerprint import fingerprint
from pipeline.graph import chains
from pipeline.graph.chains import ADDED_SPANS, SOLVED_AFTER, Chain, ChainBuilder, Span, Tokens, cut, cut_to_sum
from pipeline.graph.cost import CPU_RATES, cost_model
from pipeline.graph.dag import Kind, Stored, WorkUnit
from pipeline.graph.identity import HIDDEN_STAGE, Keyring
from pipeline.graph.outline import open_folder
from pipeline.graph.stages.calibrate import add_up, hidden_name, split_node
from pipeline.quantize.statistics import add, merge, to_tensors
from pipeline.quantize.types import Statistics
from pipeline.spec import CalibrationSpec
from tests.architectures import make_model

NUM_BLOCKS = 14
EVERY = 4
NUM_SLICES = 7

num_slices = st.integers(1, 40)
num_wanted = st.integers(1, 50)


def nodes(low: int, high: int) -> set[Span]:
    """Return every node of the tree over the slices ``low`` to ``high``."""
    if high - low == 1:
        return {(low, high)}
    middle = split_node(low, high)
    assert low < middle < high
    return {(low, high)} | nodes(low, middle) | nodes(middle, high)


@given(num_slices, num_wanted)
def test_spans_are_nodes_of_the_tree_that_cover_every_slice_once(count: int, wanted: int) -> None:
    spans = cut(count, wanted)
    assert 1 <= len(spans) <= wanted
    assert [number for low, high in spans for number in range(low, high)] == list(range(count))
    assert set(spans) <= nodes(0, count)


def test_as_many_spans_as_wanted_where_powers_of_two_allow() -> None:
    assert [len(cut(16, wanted)) for wanted in (1, 2, 3, 4, 8, 16, 99)] == [1, 2, 2, 4, 8, 16, 16]
    assert cut(6, 4) == [(0, 2), (2, 4), (4, 6)]
    assert cut(5, 2) == [(0, 4), (4, 5)]


def slice_statistics(seed: int, count: int) -> list[Statistics]:
    """Return the statistics of ``count`` slices whose sizes differ by orders of magnitude, so that order shows."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x_TI = torch.randn(5, 3, generator=generator) * 10.0 ** torch.randint(-3, 4, (1,), generator=generator)
        found.append(Statistics(x_TI.t() @ x_TI, x_TI.abs().sum(0), x_TI.abs().amax(0), 5))
    return found


def copy(statistics: Statistics) -> Statistics:
    return merge([statistics])


def span_sum(slices: list[Statistics], span: Span) -> Statistics:
    """Add up one span as a worker does: in place, inside the span."""
    return add_up(*span, lambda low, high: copy(slices[low]) if high - low == 1 else None, add)


def total(slices: list[Statistics], spans: list[Span]) -> dict[str, torch.Tensor]:
    """Add up what the workers of some spans sent, as ``merge_spans`` does."""
    sums = {span: span_sum(slices, span) for span in spans}
    return to_tensors(add_up(0, len(slices), lambda low, high: sums.get((low, high)), lambda a, b: merge([a, b])))


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32)) for name in expected)


@settings(deadline=None, max_examples=200)
@given(num_slices, num_wanted, st.integers(0, 2**32))
def test_sums_are_the_same_bits_however_the_slices_are_cut(count: int, wanted: int, seed: int) -> None:
    slices = slice_statistics(seed, count)
    whole = total(slices, [(0, count)])
    assert same_bits(total(slices, cut(count, wanted)), whole)
    assert same_bits(total(slices, cut(count, count)), whole)


@given(num_slices, num_wanted)
def test_of_a_text_that_statistics_are_of_the_sums_over_its_halves_are_there(count: int, wanted: int) -> None:
    spans = cut_to_sum(count, wanted)
    assert len(spans) <= max(wanted, 2)
    if count > 1:
        middle = split_node(0, count)
        assert middle in {low for low, _ in spans}
        assert all(high <= middle or low >= middle for low, high in spans)


@settings(deadline=None, max_examples=200)
@given(num_slices, num_wanted, st.integers(0, 2**32), st.sampled_from([2, 4, ADDED_SPANS]))
def test_sums_are_the_same_bits_when_neighbouring_spans_are_added_first(
    count: int, wanted: int, seed: int, arity: int
) -> None:
    slices = slice_statistics(seed, count)
    sums = {span: span_sum(slices, span) for span in cut(count, wanted)}
    while len(sums) > arity:
        spans = list(sums)
        rows = [spans[first : first + arity] for first in range(0, len(spans), arity)]
        ends = [(row[0][0], row[-1][1]) for row in rows]
        assert set(ends) <= nodes(0, count)
        parts, sums = sums, {}
        for end in ends:
            sums[end] = add_up(*end, lambda low, high, p=parts: p.get((low, high)), lambda a, b: merge([a, b]))
    whole = add_up(0, count, lambda low, high: sums.get((low, high)), lambda a, b: merge([a, b]))
    assert same_bits(to_tensors(whole), total(slices, [(0, count)]))


def test_the_name_of_a_slice_s_hidden_states_is_the_beginning_of_no_other_s() -> None:
    """Who needs one slice asks for what begins with its name."""
    names = [hidden_name(number) for number in (*range(120), 1000, 10**6)]
    assert not [(a, b) for a in names for b in names if a != b and b.startswith(a)]


def test_another_order_would_give_other_bits() -> None:
    slices = slice_statistics(0, 40)
    in_a_row = to_tensors(merge(slices))
    assert not same_bits(in_a_row, total(slices, [(0, 40)]))


def test_merging_leaves_what_workers_sent_as_it_was() -> None:
    slices = slice_statistics(1, 4)
    sums = {(low, low + 2): span_sum(slices, (low, low + 2)) for low in (0, 2)}
    before = {span: {n: t.clone() for n, t in to_tensors(s).items()} for span, s in sums.items()}
    add_up(0, 4, lambda low, high: sums.get((low, high)), lambda a, b: merge([a, b]))
    assert all(same_bits(to_tensors(s), before[span]) for span, s in sums.items())


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch) -> ChainBuilder:
    folder: Path = make_model("llama", tmp_path_factory.mktemp("deep") / "llama", num_hidden_layers=NUM_BLOCKS)
    outline = open_folder(folder).outline
    digests = dict.fromkeys(("config.json", *outline.index.files), "d" * 64)
    # No cost keeps the chain from being saved as often as can be.
    free = replace(CPU_RATES, store_bytes=1e18, touched_bytes=1e18, unit_s=1e-9, passing_s=1e-9)
    costs = replace(cost_model("cpu"), rates=free)
    monkeypatch_module.setattr(chains, "SAVE_EVERY", EVERY)
    return ChainBuilder(Keyring(outline, digests, "cpu"), costs, calibration=CalibrationSpec())


def tokens(name: str, slices: int = NUM_SLICES) -> Tokens:
    ids = tuple([[number, 1, 2, 3], [4, 5, 6, 7]] for number in range(slices))
    return Tokens(name, ids, fingerprint([list(part) for part in ids]))


def packs() -> list[WorkUnit]:
    return [WorkUnit(Kind.PACK, fingerprint(["pack", block]), {}, block=block) for block in range(NUM_BLOCKS)]


def places(builder: ChainBuilder, chain: Chain, block: int, span: Span) -> tuple[Stored, ...]:
    return tuple(builder.keys.saved(chain.identities[block], number) for number in range(*span))


@pytest.fixture(scope="module", params=["calibration", "held-out", "variant"])
def chain(request: pytest.FixtureRequest, builder: ChainBuilder) -> Chain:
    if request.param == "calibration":
        return builder.calibration(tokens("calibration"), 4)
    source = builder.heldout(tokens("held-out"), 4)
    return source if request.param == "held-out" else builder.variant(source, "gptq-w4-g64", {"bits": 4}, packs())


def is_source_heldout(chain: Chain) -> bool:
    last = chain.blocks[-1][0]
    return last.kind is Kind.FORWARD and not last.variant


def test_hidden_states_are_saved_slice_by_slice_every_few_blocks(builder: ChainBuilder, chain: Chain) -> None:
    kept = []
    for block, row in enumerate(chain.blocks):
        is_end = block == NUM_BLOCKS - 1
        is_saved = is_source_heldout(chain) if is_end else block % EVERY == EVERY - 1
        for span, unit in zip(chain.spans, row, strict=True):
            assert unit.saves == (places(builder, chain, block, span) if is_saved else ())
            kept += unit.saves if not is_end else ()
    assert chain.saves == tuple(kept)
    assert {place.stage for place in chain.saves} == {HIDDEN_STAGE}
    assert len(set(chain.saves)) == len(chain.saves) == NUM_SLICES * (NUM_BLOCKS // EVERY)


def test_saved_states_stand_in_for_the_block_that_left_them(chain: Chain) -> None:
    for block, row in enumerate(chain.blocks):
        for position, unit in enumerate(row):
            before = chain.embeds[position] if block == 0 else chain.blocks[block - 1][position]
            assert unit.needs[0] is before
            assert unit.stand_ins == ({before.key: before.saves} if before.saves else {})
    assert [block for block, row in enumerate(chain.blocks) if row[0].stand_ins] == [4, 8, 12]


def test_two_saves_are_there_at_any_time_and_older_ones_go(builder: ChainBuilder, chain: Chain) -> None:
    stored: set[Stored] = set()
    for block, row in enumerate(chain.blocks):
        for span, unit in zip(chain.spans, row, strict=True):
            stored |= set(unit.saves)
            assert set(unit.obsoletes) <= stored
            assert set(unit.obsoletes) <= set(places(builder, chain, block - 2 * EVERY, span))
            stored -= set(unit.obsoletes)
        depths = [b for b in range(block + 1) for span in chain.spans if stored & set(places(builder, chain, b, span))]
        assert len(set(depths)) <= 2 + is_source_heldout(chain)
        last = block - (block + 1) % EVERY
        if block < NUM_BLOCKS - 1 and last >= 0:
            assert last in depths
    assert stored, "a job that loses a worker late goes on from here"


def test_units_of_a_span_share_a_home_and_each_span_has_its_own(chain: Chain) -> None:
    homes = []
    for position, (low, _) in enumerate(chain.spans):
        own = {row[position].home for row in chain.blocks}
        assert len(own) == 1
        homes += own
        assert homes[-1].endswith(f":{low}")
    assert len(set(homes)) == len(chain.spans) == 4


def test_a_chain_s_identity_and_saves_do_not_depend_on_how_it_is_cut(builder: ChainBuilder) -> None:
    one, many = (builder.calibration(tokens("calibration"), spans) for spans in (1, NUM_SLICES))
    # Of statistics the halves are wanted, so their text is never passed in one span.
    assert (len(one.spans), len(many.spans)) == (2, NUM_SLICES)
    assert len(builder.heldout(tokens("held-out"), 1).spans) == 1
    assert one.identities == many.identities
    assert set(one.saves) == set(many.saves)
    assert not {unit.key for row in one.blocks for unit in row} & {unit.key for row in many.blocks for unit in row}
    assert not any(unit.is_durable for row in (*one.blocks, *many.blocks, one.embeds, many.embeds) for unit in row)


def test_a_variant_s_chain_starts_at_the_source_s_and_shares_nothing_after(builder: ChainBuilder) -> None:
    source = builder.heldout(tokens("held-out"), 2)
    chain = builder.variant(source, "gptq-w4-g64", {"bits": 4}, packs())
    assert chain.embeds == source.embeds
    assert not set(chain.identities) & set(source.identities)
    other = builder.variant(source, "again", {"bits": 8}, packs())
    assert not set(chain.identities) & set(other.identities)
    same = builder.variant(source, "other-name", {"bits": 4}, packs())
    assert same.identities == chain.identities
    changed = packs()
    changed[5] = WorkUnit(Kind.PACK, fingerprint("changed"), {}, block=5)
    later = builder.variant(source, "gptq-w4-g64", {"bits": 4}, changed)
    assert [a == b for a, b in zip(later.identities, chain.identities, strict=True)] == [True] * 5 + [False] * 9


def test_calibration_and_held_out_text_of_equal_tokens_stay_apart(builder: ChainBuilder) -> None:
    calibration = builder.calibration(tokens("calibration"), 1)
    heldout = builder.heldout(tokens("held-out"), 1)
    assert not set(calibration.identities) & set(heldout.identities)


def test_slices_are_part_of_a_chain_s_identity(builder: ChainBuilder) -> None:
    ids = [row for part in tokens("t").slices for row in part]
    regrouped = Tokens("t", tuple(ids[start : start + 7] for start in range(0, len(ids), 7)), tokens("t").digest)
    assert builder.calibration(regrouped, 1).identities != builder.calibration(tokens("t"), 1).identities


def test_neighbouring_spans_are_added_up_by_one_of_their_own_in_turn(
    builder: ChainBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "ADDED_SPANS", 4)
    chain = builder.calibration(tokens("calibration", 18), 18)
    for block in (0, 1, 5):
        tops = builder.sums(chain, block).units
        assert [(top.params["low"], top.params["high"]) for top in tops] == [(0, 16), (16, 18)]
        rows = list(tops[0].needs)
        assert [(row.params["low"], row.params["high"]) for row in rows] == [(0, 4), (4, 8), (8, 12), (12, 16)]
        assert [row.home for row in rows] == [row.needs[block % 4].home for row in rows]
        assert {row.kind for row in rows} == {Kind.ADD}
        assert [need for row in rows for need in row.needs] == list(chain.blocks[block][:16])
        assert tops[1].needs == chain.blocks[block][16:]
    few = builder.calibration(tokens("calibration", 4), 4)
    assert builder.sums(few, 0).units == few.blocks[0]


def test_a_span_waits_for_what_reads_its_sums_some_blocks_before(
    builder: ChainBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "ADDED_SPANS", 4)
    bounded = ChainBuilder(
        builder.keys,
        replace(builder.costs, rates=replace(builder.costs.rates, held_bytes=1.0)),
        calibration=CalibrationSpec(),
    )
    for slices, reads in ((3, "merge"), (8, "add")):
        chain = bounded.calibration(tokens("calibration", slices), slices)
        assert all(unit.after == () for row in chain.blocks[: chains.MIN_HELD_BLOCKS] for unit in row)
        merged = [
            {bounded.merge_key(chain.identities[block], group) for group in builder.keys.outline.groups[block]}
            for block in range(NUM_BLOCKS)
        ]
        for block in range(chains.MIN_HELD_BLOCKS, NUM_BLOCKS):
            held = block - chains.MIN_HELD_BLOCKS
            adds = {add.key: set(add.needs) for add in bounded.sums(chain, held).units if add.kind is Kind.ADD}
            for position, unit in enumerate(chain.blocks[block]):
                if reads == "merge":
                    assert set(unit.after) == merged[held]
                else:
                    (key,) = set(unit.after) & adds.keys()
                    assert chain.blocks[held][position] in adds[key]
                    older = block - 2 * chains.MIN_HELD_BLOCKS
                    assert set(unit.after) - {key} == (merged[older] if older >= 0 else set())


@pytest.mark.parametrize("held_bytes", [1.0, 1e15])
def test_where_the_chain_may_not_go_far_a_block_is_solved_while_the_next_one_is_passed(
    builder: ChainBuilder, held_bytes: float
) -> None:
    bounded = ChainBuilder(
        builder.keys,
        replace(builder.costs, rates=replace(builder.costs.rates, held_bytes=held_bytes)),
        calibration=CalibrationSpec(),
    )
    chain = bounded.calibration(tokens("calibration", 4), 4)
    ranks = [row[0].rank for row in chain.blocks]
    if held_bytes == 1.0:
        assert chain.lead == chains.MIN_HELD_BLOCKS
        for block in range(NUM_BLOCKS - 2):
            assert ranks[block] < chain.merge_rank(block) < ranks[block + 1]
            assert ranks[block + 1] < chain.merge_rank(block) + SOLVED_AFTER < ranks[block + 2]
    else:
        assert chain.lead > NUM_BLOCKS
        # The whole chain first, then block by block.
        merges = [chain.merge_rank(block) for block in range(NUM_BLOCKS)]
        later = [rank for merge in merges for rank in (merge, merge + SOLVED_AFTER)]
        assert [*ranks, *later] == sorted({*ranks, *later})


def test_what_is_compared_is_saved_on_the_way_and_dropped_after_two_more_saves(builder: ChainBuilder) -> None:
    """Both hidden states are: those behind the variant's own blocks, and the source's beside them."""
    source = builder.calibration(tokens("calibration", 6), 2)
    text = builder.propagation(source, "mine", {}, is_compared=True)
    rows: dict[Kind, list[WorkUnit]] = {Kind.PROPAGATE: [], Kind.COMPARE: []}
    for block in range(1, NUM_BLOCKS):
        pack = WorkUnit(Kind.PACK, f"pack {block - 1}", {}, block=block - 1, variant="mine")
        text, sums = builder.propagated_sums(builder.propagated(text, pack))
        assert (sums.block, sums.is_compared) == (block, True)
        rows[Kind.PROPAGATE].append(text.row[0])
        rows[Kind.COMPARE].append(text.source_row[0])
        assert set(text.source_row[0].needs) >= {text.row[0]}
    for kind, units in rows.items():
        assert {unit.kind for unit in units} == {kind}
        saved = [unit for unit in units if unit.saves]
        assert len(saved) > 2
        assert [unit.block for unit in saved] == [
            b for b in range(units[0].block, NUM_BLOCKS - 1) if b % EVERY == EVERY - 1
        ]
        dropped = {place for unit in units for place in unit.obsoletes}
        assert dropped == {place for unit in saved[:-2] for place in unit.saves}
        following = {unit.block: unit for unit in units}
        for unit in saved:
            assert following[unit.block + 1].stand_ins[unit.key] == unit.saves
    places = [place for units in rows.values() for unit in units for place in unit.saves]
    assert len(set(places)) == len(places)
    assert set(places) <= set(text.saves)
    assert not set(places) & set(source.saves), "another variant's, or the source's own, are dropped at other times"
