"""What units cost: floating-point operations and bytes, and from these the seconds on one worker.

Formulas, for a linear [r, n] and T tokens: forward 2 r n T; second moment 2 n^2 T; factorization n^3 / 3 in float64;
column updates r n^2 and some passes over r n, and the like for a search of scales, on at most ``SEARCH_ROWS`` rows.
Every cost is linear in the reciprocals of the rates and in the fixed seconds, so rates can be fitted to a run by least
squares (``benchmarks/rates.py``).

Costs set the order of magnitude of a plan before anything has run; a run learns its own pace.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pipeline.precision import Precision
from pipeline.quantize.scales import SEARCH_ROWS
from pipeline.quantize.solve import TILE_ROWS, TILE_ROWS_DEVICE
from pipeline.validate.generation import ROWS

SEARCH_PASSES = 18
"""Plain passes over values that take as long as the grid search of as many weights."""


@dataclass(frozen=True)
class Rates:
    """What a kind of worker does in a second, and what lies between workers.

    Attributes:
        hardware: What the rates are of, and how they are known.
        is_measured: Whether they were fitted to runs; otherwise they follow from published figures and assumptions.
        forward_flops: FLOP/s of forward passes.
        moment_flops: FLOP/s of second moments.
        column_flops: FLOP/s of column updates, in r n^2 counted twice.
        factor_flops: FLOP/s of a float64 factorization.
        grid_weights: Weights that the grid of a linear is searched for.
        added_bytes: Bytes of sums that are added up in memory.
        touched_bytes: Bytes that a worker reads or writes with their digest.
        weight_bytes: Bytes of the source's weights that a worker takes in, from where its node has them.
        decoded_bytes: Bytes of weights in a worker's memory that one token of a continuation passes by.
        store_bytes: Bytes through the link of one node to the work store and the source's weights.
        peer_bytes: Bytes from one worker of a node to another.
        network_bytes: Bytes into, and as many out of, one node.
        unit_s: Fixed seconds of a unit whose output is stored: reading headers, placing modules, the record.
        passing_s: The same where the output is passed on.
        solve_s: Solves that take longer are cut into ranges of rows.
        held_bytes: Bytes of hidden states and sums that a span may have outstanding, over all its blocks.
        weight_size: Bytes of a weight in a worker's memory.
        resident_bytes: Bytes of weights that a worker keeps for continuations.
    """

    hardware: str
    is_measured: bool
    forward_flops: float
    moment_flops: float
    column_flops: float
    factor_flops: float
    grid_weights: float
    added_bytes: float
    touched_bytes: float
    weight_bytes: float
    decoded_bytes: float
    store_bytes: float
    peer_bytes: float
    network_bytes: float
    unit_s: float
    passing_s: float
    solve_s: float
    held_bytes: float
    weight_size: int
    resident_bytes: float


CPU_RATES = Rates(
    hardware="one thread of a CPU with AVX-512",
    is_measured=True,
    forward_flops=190e9,
    moment_flops=220e9,
    column_flops=60e9,
    factor_flops=24e9,
    grid_weights=48e6,
    added_bytes=3.5e9,
    touched_bytes=1e9,
    weight_bytes=0.3e9,
    decoded_bytes=3.5e9,
    store_bytes=2e9,
    peer_bytes=2e9,
    network_bytes=1.25e9,
    unit_s=0.006,
    passing_s=0.006,
    solve_s=20.0,
    held_bytes=0.025e9,
    weight_size=4,
    resident_bytes=0.5e9,
)
"""Fitted to a conversion of the 135 M parameter model on 2 cores (AMD EPYC, AVX-512 BF16), torch 2.13.0, passes in
bfloat16, one thread a worker, 2026-11-26: seconds = overhead + work / rate for each kind. The links are not: they are a
plain disk, memory of the machine, and 10 Gbit/s Ethernet."""

H100_RATES = Rates(
    hardware="one H100 SXM of a node of eight; assumed from published figures, never measured",
    is_measured=False,
    forward_flops=400e12,
    moment_flops=300e12,
    column_flops=30e12,
    factor_flops=15e12,
    grid_weights=3.5e9,
    added_bytes=1e12,
    touched_bytes=3e9,
    weight_bytes=50e9,
    decoded_bytes=2.5e12,
    store_bytes=10e9,
    peer_bytes=300e9,
    network_bytes=50e9,
    unit_s=0.02,
    passing_s=0.005,
    solve_s=1.0,
    held_bytes=64e9,
    weight_size=2,
    resident_bytes=72e9,
)
"""Assumed, not measured. Published peaks: bf16 989 TFLOP/s dense, of which 40 % for forward passes and 30 % for second
moments; float32 67 TFLOP/s, of which 45 % for column updates; float64 tensor cores 67 TFLOP/s, of which 22 % for a
Cholesky factorization; memory 3.35 TB/s, which bounds a grid search of some twenty passes over five float32 arrays,
adding at three, and continuations (75 %). NVLink 450 GB/s one way, 300 of it; network 400 Gbit/s a node; local NVMe
10 GB/s a node; a host core writes 5 GB/s and reads 2 GB/s with a digest (SHA-256 with instructions for it), which makes
3 GB/s over both; weights come over PCIe 5 at 50 GB/s."""


FLOAT32_FORWARD_FLOPS = {"cpu": 85e9, "cuda": 30e12}
"""Rates of forward passes in float32: fitted likewise on 2026-11-24, and 45 % of the published 67 TFLOP/s."""

DEVICE_RATES = (
    "forward_flops",
    "moment_flops",
    "column_flops",
    "factor_flops",
    "grid_weights",
    "added_bytes",
    "weight_bytes",
    "decoded_bytes",
    "peer_bytes",
    "held_bytes",
    "resident_bytes",
)
"""What workers that share a device have a part of each; touching files and the node's links are not the device's."""


@dataclass(frozen=True)
class GroupShape:
    """A linear group as far as it costs anything.

    Attributes:
        rows: out_features of all members.
        width: in_features.
    """

    rows: int
    width: int


def forward_flops(parameters: float, tokens: float) -> float:
    """Return the operations of a forward pass."""
    return 2.0 * parameters * tokens


def moment_flops(groups: Iterable[GroupShape], tokens: float) -> float:
    """Return the operations of second moments."""
    return sum(2.0 * tokens * group.width**2 for group in groups)


def solve_flops(group: GroupShape) -> float:
    """Return the operations of solving a group's columns."""
    return 2.0 * group.rows * group.width**2


def solve_bytes(group: GroupShape) -> float:
    """Return the size of what a solve takes in: the second moment, its factor and the group's rows, float32."""
    return 4.0 * group.width * (2 * group.width + group.rows)


def factor_flops(group: GroupShape) -> float:
    """Return the operations of a factorization."""
    return group.width**3 / 3


def scale_flops(group: GroupShape) -> float:
    """Return the operations of a search for activation-aware scales: a dozen losses on a sample of the rows, and two at
    the end; of a loss half of the products are made, as they are symmetric."""
    return 14.0 * min(group.rows, SEARCH_ROWS) * group.width**2


def sum_bytes(groups: Iterable[GroupShape]) -> float:
    """Return the size of the groups' second moments."""
    return sum(4.0 * group.width**2 for group in groups)


@dataclass(frozen=True)
class CostModel:
    """Seconds of units on one worker.

    Attributes:
        rates: Of the worker.
        tile_rows: Rows that are solved at once; ranges of rows are whole tiles.
    """

    rates: Rates
    tile_rows: int

    def shared_by(self, workers: int) -> CostModel:
        """Return the costs for each of so many workers of one device when all of them compute."""
        if workers == 1:
            return self
        rates = self.rates
        own = {name: getattr(rates, name) / workers for name in DEVICE_RATES}
        return replace(self, rates=replace(rates, hardware=f"{rates.hardware}; {workers} workers share it", **own))

    def forward_s(self, parameters: float, tokens: float, groups: Iterable[GroupShape] = ()) -> float:
        """Return the seconds of one block over tokens, with the second moments of ``groups``."""
        rates = self.rates
        moments = moment_flops(groups, tokens) / rates.moment_flops
        return rates.passing_s + forward_flops(parameters, tokens) / rates.forward_flops + moments

    def score_s(self, head_parameters: float, tokens: float) -> float:
        """Return the seconds of comparing two models' predictions of tokens."""
        return self.rates.unit_s + forward_flops(2 * head_parameters, tokens) / self.rates.forward_flops

    def add_s(self, groups: Iterable[GroupShape], num_parts: int) -> float:
        """Return the seconds of adding up sums of ``groups`` that stay in memory."""
        return self.rates.passing_s + sum_bytes(groups) * num_parts / self.rates.added_bytes

    def merge_s(self, group: GroupShape, num_parts: int) -> float:
        """Return the seconds of adding a group's sums and storing the result."""
        size = sum_bytes((group,))
        return self.rates.unit_s + size * num_parts / self.rates.added_bytes + 2 * size / self.rates.touched_bytes

    def factor_s(self, group: GroupShape) -> float:
        """Return the seconds of a factorization."""
        return self.rates.passing_s + factor_flops(group) / self.rates.factor_flops

    def sense_s(self, parameters: float, tokens: float) -> float:
        """Return the seconds of a pass forwards and back, which computes each block anew; weights need no gradients."""
        return self.rates.unit_s + 3 * forward_flops(parameters, tokens) / self.rates.forward_flops

    def appraise_s(self, group: GroupShape) -> float:
        """Return the seconds of weighing a solved group's losses: its codes are read with them."""
        return self.rates.unit_s + group.rows * group.width / self.rates.touched_bytes

    def scales_s(self, group: GroupShape) -> float:
        """Return the seconds of a search for activation-aware scales."""
        # Its dozen grids are spanned, its last two searched.
        passes = (12 + 2 * SEARCH_PASSES) * min(group.rows, SEARCH_ROWS) * group.width / SEARCH_PASSES
        return self.rates.unit_s + scale_flops(group) / self.rates.forward_flops + passes / self.rates.grid_weights

    def solve_s(self, group: GroupShape, is_gptq: bool, refinement: int = 0) -> float:
        """Return the seconds of solving a group's rows, with so many rounds of refinement, each of two products."""
        columns = solve_flops(group) / (self.rates.column_flops if is_gptq else self.rates.forward_flops)
        columns += refinement * 2 * solve_flops(group) / self.rates.column_flops
        return self.rates.unit_s + columns + group.rows * group.width / self.rates.grid_weights

    def groups_together(
        self, group: GroupShape, is_gptq: bool, longest_s: float, refinement: int, largest_bytes: float
    ) -> int:
        """Return how many groups of one shape are solved by one unit.

        Args:
            group: One of them.
            is_gptq: How codes are found.
            longest_s: For how long a unit may run.
            refinement: Rounds of it.
            largest_bytes: What the largest group takes in: so much is there for them.
        """
        own_s = self.solve_s(group, is_gptq, refinement) - self.rates.unit_s
        return max(1, min(int((longest_s - self.rates.unit_s) / own_s), int(largest_bytes / solve_bytes(group))))

    def pack_s(self, parameters: float) -> float:
        """Return the seconds of packing a block and proving the file."""
        return self.rates.unit_s + 4.0 * parameters / self.rates.touched_bytes

    def generate_s(self, parameters: float, num_prompts: int, num_passes: int) -> float:
        """Return the seconds of continuing prompts greedily; a pass of a few of them is bound by reading the
        weights."""
        touched = 4.0 * parameters / self.rates.touched_bytes
        num_reads = num_passes * -(-num_prompts // ROWS)
        return self.rates.unit_s + touched + 4.0 * parameters * num_reads / self.rates.decoded_bytes

    def continue_s(self, parameters: float, num_prompts: int, num_tokens: int) -> float:
        """Return the seconds of taking prompts of ``num_tokens`` each through weights that are in memory."""
        passed = self.rates.weight_size * parameters / self.rates.decoded_bytes
        computed = forward_flops(parameters, num_tokens) / self.rates.forward_flops
        return self.rates.passing_s + num_prompts * (passed + computed)

    def load_s(self, parameters: float) -> float:
        """Return the seconds of taking in weights that will be passed by again and again."""
        return self.rates.passing_s + self.rates.weight_size * parameters / self.rates.weight_bytes

    def embed_s(self, num_bytes: float) -> float:
        """Return the seconds of taking in what lies outside the blocks; looking tokens up costs next to nothing."""
        return self.rates.passing_s + num_bytes / self.rates.weight_bytes

    def copy_s(self, num_bytes: float) -> float:
        """Return the seconds of copying tensors."""
        return self.rates.unit_s + 2 * num_bytes / self.rates.touched_bytes

    def row_ranges(
        self, group: GroupShape, is_gptq: bool, longest_s: float, refinement: int = 0
    ) -> list[tuple[int, int]]:
        """Return a group's rows cut into ranges of whole tiles that take at most ``longest_s`` each to solve and
        refine, where tiles allow."""
        num_tiles = -(-group.rows // self.tile_rows)
        parts = min(num_tiles, max(1, math.ceil(self.solve_s(group, is_gptq, refinement) / longest_s)))
        per_part = -(-num_tiles // parts) * self.tile_rows
        return [(low, min(low + per_part, group.rows)) for low in range(0, group.rows, per_part)]


def cost_model(device: str, precision: Precision = Precision.BFLOAT16) -> CostModel:
    """Return the costs of a job on ``device`` (``cpu`` or ``cuda``), with passes over text in ``precision``, as far as
    they are known before it runs."""
    rates = CPU_RATES if device == "cpu" else H100_RATES
    if precision is Precision.FLOAT32:
        rates = replace(rates, forward_flops=FLOAT32_FORWARD_FLOPS[device])
    return CostModel(rates, TILE_ROWS.get(device, TILE_ROWS_DEVICE))
