"""How long planning takes on a work store in a bucket: SeaweedFS on this machine, alone and with a delay per request.

Run from the repository root: ``python -m benchmarks.work_store [--stages 2000] [--delay-ms 30]``
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pipeline.fingerprint import digest_bytes
from pipeline.settings import load_settings
from pipeline.storage.work import WorkStore, open_work_store
from tests.s3_faults import S3Faults, Trouble
from tests.s3_server import S3Server

ADDRESS = "s3://work/benchmark"
SAMPLE = 100
"""Stages looked up one by one; the time is scaled up to all of them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=2000)
    parser.add_argument("--delay-ms", type=float, default=30.0)
    args = parser.parse_args()
    places = [("solve", digest_bytes(str(number).encode())) for number in range(args.stages)]
    absent = [("solve", digest_bytes(f"absent {number}".encode())) for number in range(args.stages)]
    with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder, "s3")) as server:
        server.make_bucket("work")
        os.environ.update(server.environment)
        _write(_open(folder), places)
        print(f"{args.stages} stages, seconds to look all of them up")
        print(f"{'':<32} {'together':>9} {'one by one':>11}")
        _measure("", folder, places, absent)
        with S3Faults(server) as faults:
            os.environ.update(faults.environment)
            faults.trouble = Trouble(delay_s=args.delay_ms / 1000)
            _measure(f"{args.delay_ms:g} ms a request, ", folder, places, absent)


def _open(folder: str) -> WorkStore:
    return open_work_store(ADDRESS, replace(load_settings(), cache_dir=Path(folder, "cache")))


def _write(store: WorkStore, places: Sequence[tuple[str, str]]) -> None:
    def write(place: tuple[str, str]) -> None:
        with store.writing(*place) as writer:
            writer.path("output.safetensors").write_bytes(place[1].encode())
            writer.finish({"loss": 0.5, "num_tokens": 1024})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, places))


def _measure(words: str, folder: str, present: Sequence[tuple[str, str]], absent: Sequence[tuple[str, str]]) -> None:
    for state, places in (("none is there", absent), ("all are there", present)):
        start = time.perf_counter()
        _open(folder).lookup_all(places)
        together_s = time.perf_counter() - start
        store, start = _open(folder), time.perf_counter()
        for place in places[:SAMPLE]:
            store.lookup(*place)
        alone_s = (time.perf_counter() - start) * len(places) / SAMPLE
        print(f"{words + state:<32} {together_s:>9.2f} {alone_s:>11.1f}")


if __name__ == "__main__":
    main()
