"""A fetch killed with SIGKILL loses nothing that had arrived."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.loopback_hub import Fault, LoopbackHub

PIECE = 65_536
FETCH = f"""
from pipeline.hub import client, fetch
from pipeline.hub.source import pin_source
from pipeline.settings import load_settings
client.RANGE_BYTES = {PIECE}
settings = load_settings()
fetched = fetch.fetch(pin_source("org/model", settings), settings)
print(fetched.folder)
print(fetched.digests["model.safetensors"])
"""


def test_a_killed_fetch_continues_with_the_missing_bytes_only(tmp_path: Path) -> None:
    content = os.urandom(PIECE * 4 + 1000)
    with LoopbackHub(token="hf_secret", cdn=True) as hub:
        commit = hub.add("org/model", {"config.json": b"{}", "model.safetensors": content})
        command, env = [sys.executable, "-c", FETCH], {**os.environ, **hub.environment(tmp_path)}
        # The third piece stops in its middle: by then the first two are with the client for certain.
        hub.faults.append(Fault("model.safetensors", skip=2, stall_after=100))
        with subprocess.Popen(command, env=env) as killed:
            try:
                assert hub.stalled.wait(timeout=60)
            finally:
                killed.send_signal(signal.SIGKILL)
        assert killed.returncode == -signal.SIGKILL
        folder = tmp_path / "bitmill/sources/org/model" / commit
        kept = (folder / "model.safetensors.part").read_bytes()
        assert 2 * PIECE <= len(kept) <= 2 * PIECE + 100
        assert content.startswith(kept)
        assert not (folder / "model.safetensors").exists()
        hub.requests.clear()
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        to_cdn = [request.headers["range"] for request in hub.requests if request.server == "cdn"]
        assert hub.ranges("config.json") == []
    assert done.stdout.splitlines()[0] == str(folder)
    assert (folder / "model.safetensors").read_bytes() == content
    first = min(len(kept) + PIECE, len(content)) - 1
    last = min(first + PIECE, len(content) - 1)
    assert to_cdn[:2] == [f"bytes={len(kept)}-{first}", f"bytes={first + 1}-{last}"]
    assert to_cdn[-1].endswith(f"-{len(content) - 1}")
    assert not list(folder.glob("*.part"))
