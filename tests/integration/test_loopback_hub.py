"""The unmodified hub client reads from the loopback hub, so what passes against it speaks the protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.loopback_hub import LoopbackHub

CLIENT = """
import json, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

def raised(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return ""

api = HfApi()
print(json.dumps({
    "folder": snapshot_download("org/model"),
    "dataset": hf_hub_download("org/texts", "data/train.txt", repo_type="dataset"),
    "gated": api.model_info("org/gated").gated,
    "pull_request": api.model_info("org/model", revision="refs/pr/1").sha,
    "files": sorted(entry.path for entry in api.list_repo_tree("org/model", recursive=True)),
    "top": sorted(entry.path for entry in api.list_repo_tree("org/model")),
    "paths": [info.lfs.sha256 for info in api.get_paths_info("org/model", ["model.safetensors"])],
    "refs": sorted(ref.name for ref in api.list_repo_refs("org/model").branches),
    "models": sorted(info.id for info in api.list_models()),
    "who": api.whoami()["name"],
    "errors": [
        raised(lambda: api.model_info("org/absent")),
        raised(lambda: api.model_info("org/model", revision="absent")),
        raised(lambda: hf_hub_download("org/model", "absent.json")),
        raised(lambda: list(api.list_repo_tree("org/model", "absent"))),
        raised(lambda: hf_hub_download("org/gated", "config.json")),
    ],
}))
"""


def test_the_released_client_reads_models_and_datasets(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "sub/note.txt": b"note", "model.safetensors": bytes(range(256)) * 400}
    for path, content in files.items():
        (tmp_path / "root/models/org/model" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root/models/org/model" / path).write_bytes(content)
    with LoopbackHub(tmp_path / "root", token="hf_secret", cdn=True) as hub:
        hub.add("org/texts", {"data/train.txt": b"some text"}, kind="dataset")
        hub.add("org/gated", files, gated=True)
        pull_request = hub.add("org/model", {"config.json": b"changed"}, revision="refs/pr/1")
        command, env = [sys.executable, "-c", CLIENT], {**os.environ, **hub.environment(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        to_cdn = [request for request in hub.requests if request.server == "cdn"]
    seen = json.loads(done.stdout)
    assert {path: (Path(seen["folder"]) / path).read_bytes() for path in files} == files
    assert Path(seen["dataset"]).read_bytes() == b"some text"
    assert seen["gated"] == "manual"
    assert seen["pull_request"] == pull_request
    assert seen["files"] == ["config.json", "model.safetensors", "sub", "sub/note.txt"]
    assert seen["top"] == ["config.json", "model.safetensors", "sub"]
    assert seen["paths"] == [hashlib.sha256(files["model.safetensors"]).hexdigest()]
    assert seen["refs"] == ["main", "refs/pr/1"]
    assert seen["models"] == ["org/gated", "org/model"]
    assert seen["who"] == "tester"
    assert seen["errors"] == [
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
        "RemoteEntryNotFoundError",
        "GatedRepoError",
    ]
    assert to_cdn
    assert not any("authorization" in request.headers for request in to_cdn)
