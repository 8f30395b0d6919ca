"""``bitmill plan --simulate`` and ``--shape``: what is printed, as text and as JSON, and what is refused."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from jobs.cli.main import cli
from pipeline.errors import PlanError, SpecError
from pipeline.units import parse_bytes

SHAPE = ["plan", "--shape", "llama-3.1-8b", "--variant", "rtn-w8-g128", "--samples", "32"]


def invoke(*words: str) -> str:
    result = CliRunner().invoke(cli, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_shape_on_clusters_is_printed_with_bottleneck_and_bytes() -> None:
    text = " ".join(invoke(*SHAPE, "--simulate", "nodes=1,gpus=4", "--simulate", "nodes=2,gpus=8,samples=64").split())
    assert text.count("simulated") == 2
    assert "1 x 4 workers" in text
    assert "2 x 8 workers" in text
    assert "efficiency" in text
    assert "bottleneck: " in text
    assert "memory per worker up to " in text
    assert "never measured" in text
    assert "stage units compute from - to memory" in text
    assert "calibrate" in text
    assert "price" not in text


def test_a_shape_on_clusters_as_json() -> None:
    found = json.loads(invoke(*SHAPE, "--json", "--simulate", "nodes=1,gpus=4"))
    assert found["source"] == "llama-3.1-8b"
    (simulated,) = found["simulated"]
    prediction = simulated["prediction"]
    assert prediction["cluster"] == {"nodes": 1, "workers": 4, "uneven": []}
    assert len(prediction["busy_shares"]) == 4
    assert simulated["efficiency"] == pytest.approx(simulated["one_worker_s"] / 4 / prediction["seconds"])
    assert sum(prediction["waits"].values()) == pytest.approx(prediction["seconds"])
    rows = simulated["stages"]
    assert {row["stage"]["kind"] for row in rows} >= {
        "embed",
        "calibrate",
        "merge",
        "solve",
        "pack",
        "forward",
    }
    assert sum(row["stage"]["num_units"] for row in rows) == prediction["num_units"]
    computed_s = sum(row["stage"]["compute_s"] for row in rows)
    assert computed_s == pytest.approx(sum(prediction["busy_shares"]) * prediction["seconds"])
    assert max(row["stage"]["end_s"] for row in rows) == pytest.approx(prediction["seconds"])
    assert max(row["worker_bytes"] for row in rows) == simulated["worker_bytes"]
    assert {row["price"] for row in rows} == {None}


@pytest.mark.parametrize("words", [SHAPE, [*SHAPE, "org/model", "--simulate", "gpus=8"]])
def test_a_shape_needs_a_cluster_and_no_source(words: list[str]) -> None:
    with pytest.raises(SpecError, match="--shape stands for a SOURCE"):
        invoke(*words)


def test_a_shape_s_workers_keep_their_memory_or_are_refused() -> None:
    words = [*SHAPE, "--json", "--simulate", "cpus=2,samples=64,length=512,slice=1"]

    def needed(*more: str) -> int:
        (simulated,) = json.loads(invoke(*words, *more))["simulated"]
        found: int = simulated["worker_bytes"]
        return found

    limit = needed() - 1
    assert needed("--max-memory", str(limit)) <= limit
    with pytest.raises(PlanError, match=r"a worker needs .*; --max-memory is 1 GB"):
        needed("--max-memory", "1GB")


def test_sizes_are_read_with_decimal_and_binary_units() -> None:
    sizes = ["1.5GB", "800 MB", "2GiB", "512k", "17"]
    assert [parse_bytes(text) for text in sizes] == [1_500_000_000, 800_000_000, 2**31, 512_000, 17]
    for text in ("", "much", "-1GB", "1.5.2GB", "1GB2"):
        with pytest.raises(SpecError, match="is no size"):
            parse_bytes(text)
