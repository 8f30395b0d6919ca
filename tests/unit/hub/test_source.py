"""A source is pinned before it is read, and what cannot be a source is refused with the way out."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import (
    CorruptWeightsError,
    PipelineError,
    SourceError,
    SourceNotFoundError,
    UnsafeWeightsError,
)
from pipeline.hub.repository import SourceFile
from pipeline.hub.source import companion_files, needed_files, pin_source, range_reader, read_bytes, read_range
from pipeline.settings import Settings
from pipeline.tensors.index import read_index
from pipeline.tensors.local import read_folder_index
from tests.loopback_hub import Fault, LoopbackHub

NEEDED = [
    "LICENSE.txt",
    "README.md",
    "additional_chat_templates/tool.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def refusal(text: str, settings: Settings, kind: type[PipelineError] = SourceNotFoundError) -> PipelineError:
    with pytest.raises(kind) as caught:
        pin_source(text, settings, sleep=lambda seconds: None)
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def test_a_repository_is_pinned_and_later_reads_use_its_commit(
    hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes]
) -> None:
    commit = hub.add("org/model", model_files)
    source = pin_source("org/model@main", settings)
    assert (source.name, source.is_local, source.endpoint, source.commit) == ("org/model", False, hub.url, commit)
    hub.add("org/model", {**model_files, "config.json": b"moved on"})
    assert read_bytes(source, settings, "config.json") == model_files["config.json"]
    assert range_reader(source, settings)("model-00001-of-00002.safetensors", 3, 7) == bytes([3, 4, 5, 6])
    first, *later = [request.path for request in hub.requests]
    assert first.startswith("/api/models/org/model/revision/main")
    assert later
    assert all(path.startswith(f"/org/model/resolve/{commit}/") for path in later)


def test_digests_of_the_listing_are_kept(hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes]) -> None:
    hub.add("org/model", model_files)
    files = {file.path: file for file in pin_source("org/model", settings).files}
    blobs = next(iter(hub.repos["model", "org/model"].commits.values()))
    assert sorted(files) == sorted(model_files)
    config, weights = blobs["config.json"], blobs["model-00001-of-00002.safetensors"]
    assert files["config.json"] == SourceFile("config.json", len(config.content), None, config.git_sha1)
    assert files["model-00001-of-00002.safetensors"].sha256 == weights.sha256
    assert files["model-00001-of-00002.safetensors"].git_sha1 is None


@pytest.mark.parametrize("text", ["model", "org/model@v1.0", "org/model@refs/pr/3"])
def test_bare_names_tags_and_pull_requests_are_read(
    hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes], text: str
) -> None:
    name, _, revision = text.partition("@")
    commit = hub.add(name, model_files, revision=revision or "main")
    assert pin_source(text, settings).commit == commit


def test_a_commit_can_be_asked_for(hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes]) -> None:
    old = hub.add("org/model", model_files)
    hub.add("org/model", {**model_files, "config.json": b"{}"})
    assert pin_source(f"org/model@{old}", settings).commit == old


@pytest.mark.parametrize("is_local", [True, False])
def test_only_needed_files_are_selected(
    hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes], tmp_path: Path, is_local: bool
) -> None:
    hub.add("org/model", model_files)
    folder = write(tmp_path / "model", model_files)
    (folder / ".hidden").write_text("x")
    (folder / "dangling.model").symlink_to("nowhere")
    source = pin_source(str(folder) if is_local else "org/model", settings)
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert list(source.weight_files) == weights
    assert [file.path for file in needed_files(source)] == NEEDED
    travels = [path for path in NEEDED if path not in (*weights, "README.md", "model.safetensors.index.json")]
    assert [file.path for file in companion_files(source)] == travels


def test_a_folder_is_read_in_place(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "my-model", {"config.json": b"{}", "model.safetensors": b"0123456789"})
    monkeypatch.chdir(folder)
    source = pin_source(".", settings)
    assert (source.name, source.is_local, source.endpoint, source.commit) == ("my-model", True, None, None)
    assert source.location == str(folder)
    assert source.files == (SourceFile("config.json", 2), SourceFile("model.safetensors", 10))
    assert read_range(source, settings, "model.safetensors", 2, 5) == b"234"
    with pytest.raises(CorruptWeightsError, match="ends before byte 11"):
        read_range(source, settings, "model.safetensors", 2, 11)
    with pytest.raises(SourceNotFoundError, match="no file 'absent'"):
        read_bytes(source, settings, "absent")


@pytest.mark.parametrize(
    "text", ["./x", "/nonexistent/x", "~/no-such-folder-of-a-model", "~nosuchuser123/x", "../x", "./org/name@main"]
)
def test_an_absent_path_is_called_a_folder(settings: Settings, text: str) -> None:
    error = refusal(text, settings)
    assert error.message == f"there is no folder {text!r}"


@pytest.mark.parametrize("text", ["a" * 5000, "a/" * 3000, "org/" + "a" * 300])
def test_a_name_that_no_file_system_takes_is_no_folder(settings: Settings, hub: LoopbackHub, text: str) -> None:
    error = refusal(text, settings)
    assert error.code in ("source.bad_name", "source.not_found")
    assert len(error.message) < 500


def test_an_overlong_path_is_called_a_folder(settings: Settings) -> None:
    error = refusal("/" + "a" * 5000, settings)
    assert error.message.startswith("there is no folder '/aaa")
    assert len(error.message) < 500


def test_a_file_is_not_a_folder(settings: Settings, tmp_path: Path) -> None:
    path = write(tmp_path, {"model.gguf": b"GGUF"}) / "model.gguf"
    assert "is a file, not a folder" in refusal(str(path), settings).message


@pytest.mark.parametrize(
    "text", ["", "a/b/c", "org/name@", "org name", "https://host/org/name", "a\0b", "org/ä", "-x/y"]
)
def test_text_that_is_no_source_is_refused(settings: Settings, hub: LoopbackHub, text: str) -> None:
    assert "neither an existing folder nor of the form org/name[@revision]" in refusal(text, settings).message
    assert hub.requests == []


@pytest.mark.parametrize("text", ["a--b/c", "org/model.git"])
def test_names_that_the_client_refuses_are_refused_alike(settings: Settings, text: str) -> None:
    assert "neither an existing folder" in refusal(text, settings).message


def test_an_absent_repository_says_how_to_log_in(settings: Settings, hub: LoopbackHub) -> None:
    error = refusal("org/absent", settings)
    assert f"{hub.url} has no repository org/absent" in error.message
    assert "hf auth login" in error.hint


def test_an_absent_revision_names_it(settings: Settings, hub: LoopbackHub, model_files: dict[str, bytes]) -> None:
    hub.add("org/model", model_files)
    error = refusal("org/model@v9", settings)
    assert (error.code, "no revision 'v9'" in error.message) == ("source.revision_not_found", True)


def test_a_gated_repository_says_what_to_accept(
    settings: Settings, hub: LoopbackHub, model_files: dict[str, bytes]
) -> None:
    # An index is read when the source is pinned, a config later.
    hub.add("org/model", model_files, gated=True)
    error = refusal("org/model@main", settings)
    assert (error.code, error.message.partition(":")[0]) == ("source.gated", "org/model is gated")
    assert f"accept its conditions at {hub.url}/org/model, then" in error.hint
    hub.add("org/single", {"config.json": b"{}", "model.safetensors": b"x"}, gated=True)
    source = pin_source("org/single", settings)
    with pytest.raises(SourceNotFoundError, match=r"^org/single is gated") as caught:
        read_bytes(source, settings, "config.json")
    assert f"accept its conditions at {hub.url}/org/single, then" in caught.value.hint


def test_a_repository_that_is_gone_after_it_was_pinned_is_named_without_the_file(
    settings: Settings, hub: LoopbackHub, model_files: dict[str, bytes]
) -> None:
    hub.add("org/model", model_files)
    source = pin_source("org/model", settings)
    del hub.repos["model", "org/model"]
    with pytest.raises(SourceNotFoundError, match=rf"^{hub.url} has no repository org/model,"):
        read_bytes(source, settings, "config.json")


@pytest.mark.parametrize(("token", "code"), [(None, "source.not_found"), ("wrong", "source.unauthorized")])
def test_a_private_hub_asks_for_a_token(
    tmp_path: Path, settings: Settings, model_files: dict[str, bytes], token: str | None, code: str
) -> None:
    with LoopbackHub(token="right") as private:
        private.add("org/model", model_files)
        own = dataclasses.replace(settings, hub_endpoint=private.url, hub_token=token)
        error = refusal("org/model", own)
        assert (error.code, "hf auth login" in error.hint) == (code, True)
        assert "wrong" not in str(error)
        assert pin_source("org/model", dataclasses.replace(own, hub_token="right")).commit


def test_a_hub_that_is_not_there_is_said_at_once(settings: Settings) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        waits: list[float] = []
        with pytest.raises(SourceNotFoundError) as caught:
            pin_source("org/model", dataclasses.replace(settings, hub_endpoint=endpoint), sleep=waits.append)
    assert "no connection could be made" in caught.value.message
    assert f"HF_ENDPOINT, now {endpoint}" in caught.value.hint
    assert waits == []


REPLIES: list[tuple[Any, str]] = [
    ([], "no hub reply"),
    ({"id": "org/model"}, "no hub reply"),
    ({"id": "org/model", "sha": "../../x", "siblings": []}, "no hub reply"),
    ({"id": "org/model", "sha": "a" * 40, "siblings": [{"rfilename": "../../.bashrc", "size": 1}]}, "no path inside"),
    ({"id": "org/model", "sha": "a" * 40, "siblings": [{"rfilename": "/etc/passwd", "size": 1}]}, "no path inside"),
    ({"id": "org/model", "sha": "a" * 40, "siblings": [{"rfilename": "a\\..\\b", "size": 1}]}, "no path inside"),
    ({"id": "org/model", "sha": "a" * 40, "siblings": [{"rfilename": "config.json"}]}, "without its size"),
]


@pytest.mark.parametrize(("reply", "reason"), REPLIES)
def test_a_hostile_or_foreign_reply_is_refused(
    settings: Settings,
    hub: LoopbackHub,
    model_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    reply: Any,
    reason: str,
) -> None:
    hub.add("org/model", model_files)
    monkeypatch.setattr("tests.loopback_hub.HubHandler._info", lambda *args: reply)
    with pytest.raises(SourceError) as caught:
        pin_source("org/model", settings)
    assert reason in caught.value.message


def test_pickles_alone_are_refused_with_the_way_out(
    settings: Settings, hub: LoopbackHub, model_files: dict[str, bytes]
) -> None:
    hub.add("org/model", {path: data for path, data in model_files.items() if "safetensors" not in path})
    error = refusal("org/model", settings, UnsafeWeightsError)
    assert "org/model@" in error.message
    assert "original/consolidated.00.pth, pytorch_model.bin" in error.message
    assert "optimizer.pt" not in error.message
    assert "runs whatever code is in it" in error.message
    assert "safe_serialization=True" in error.hint
    assert "@refs/pr/N" in error.hint


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt", "a.PKL", "sub/a.bin"])
def test_every_pickle_ending_is_known(settings: Settings, tmp_path: Path, name: str) -> None:
    refusal(str(write(tmp_path / "m", {"config.json": b"{}", name: b""})), settings, UnsafeWeightsError)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "has no config.json"),
        (["model.safetensors"], "has no config.json"),
        (["config.json"], "no *.safetensors file at its top level"),
        (["config.json", "training_args.bin"], "no *.safetensors file at its top level"),
        (["config.json", "original/model.safetensors"], "no *.safetensors file at its top level"),
        (["config.json", "m.gguf", "m.onnx"], "it has gguf, onnx, which cannot be converted"),
    ],
)
def test_a_folder_without_a_model_is_refused(settings: Settings, tmp_path: Path, files: list[str], reason: str) -> None:
    (tmp_path / "m").mkdir()
    error = refusal(str(write(tmp_path / "m", dict.fromkeys(files, b"{}"))), settings)
    assert reason in error.message
    assert str(tmp_path / "m") in error.message


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "is not a UTF-8 JSON object"),
        (b"[]", "is not a UTF-8 JSON object"),
        (b"\xff", "is not a UTF-8 JSON object"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the name 'a' occurs twice"),
        (b'{"weight_map": 1}', "has no weight_map"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": {"a": ["x"]}}', "'a' is in ['x'], which is no safetensors file"),
        (b'{"weight_map": {"a": "absent.safetensors"}}', "'a' is in 'absent.safetensors', which is absent"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "'a' is in 'pytorch_model.bin', which is no safetensors file"),
        (b'{"weight_map": {"a": "sub/a.safetensors"}}', "'a' is in 'sub/a.safetensors', which is not beside"),
        (b'{"weight_map": {"a": 7}}', "'a' is in 7, which is no safetensors file"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(
    settings: Settings, hub: LoopbackHub, model_files: dict[str, bytes], index: bytes, reason: str
) -> None:
    files = {**model_files, "sub/a.safetensors": b"x", "model.safetensors.index.json": index}
    hub.add("org/model", files)
    message = refusal("org/model", settings, CorruptWeightsError).message
    assert reason in message
    assert message.startswith("org/model@")


def test_several_files_without_an_index_are_refused_before_anything_is_fetched(
    settings: Settings, hub: LoopbackHub, model_files: dict[str, bytes]
) -> None:
    del model_files["model.safetensors.index.json"]
    hub.add("org/model", model_files)
    error = refusal("org/model", settings, CorruptWeightsError)
    assert "there are 2 safetensors files" in error.message
    assert "add the index" in error.hint


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "adapter_model.safetensors"], "model.safetensors"),
        (["weights.safetensors", "consolidated.safetensors"], "weights.safetensors"),
        (["consolidated.safetensors", "sub/model.safetensors"], "consolidated.safetensors"),
    ],
)
def test_a_plan_and_a_conversion_choose_the_same_weights(
    settings: Settings, hub: LoopbackHub, tmp_path: Path, names: list[str], chosen: str, is_local: bool
) -> None:
    (tmp_path / "one").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "one" / "file")
    files = {"config.json": b"{}", **dict.fromkeys(names, (tmp_path / "one" / "file").read_bytes())}
    hub.add("org/model", files)
    folder = write(tmp_path / "model", files)
    source = pin_source(str(folder) if is_local else "org/model", settings)
    assert source.weight_files == (chosen,)
    assert read_index(source.file_sizes, range_reader(source, settings)).files == (chosen,)
    assert read_folder_index(folder).files == (chosen,)


def test_a_listing_is_asked_for_again_after_an_outage(
    settings: Settings, hub: LoopbackHub, model_files: dict[str, bytes]
) -> None:
    commit = hub.add("org/model", model_files)
    hub.faults.append(Fault("/api/models/org/model", times=2, status=503))
    waits: list[float] = []
    assert pin_source("org/model", settings, sleep=waits.append).commit == commit
    assert waits == [1.0, 2.0]


def test_a_pinned_source_holds_no_secret(hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes]) -> None:
    hub.add("org/model", model_files)
    source = pin_source("org/model", dataclasses.replace(settings, hub_token="hf_secret"))
    assert pickle.loads(pickle.dumps(source)) == source
    assert "hf_secret" not in repr(source)
    assert b"hf_secret" not in pickle.dumps(source)


def test_a_token_file_matters_to_a_hub_and_not_to_a_folder(
    settings: Settings, hub: LoopbackHub, tmp_path: Path, model_files: dict[str, bytes]
) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    own = dataclasses.replace(settings, hub_token_file=tmp_path / "token")
    folder = write(tmp_path / "model", {"config.json": b"{}", "model.safetensors": b"0123456789"})
    assert pin_source(str(folder), own).is_local
    hub.add("org/model", model_files)
    assert str(tmp_path / "token") in refusal("org/model", own, SourceError).message
    (tmp_path / "token").write_text("hf_x\n")
    pin_source("org/model", own)
    assert {request.headers["authorization"] for request in hub.requests} == {"Bearer hf_x"}


def test_nobody_logged_in_means_anonymous(
    hub: LoopbackHub, settings: Settings, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client would otherwise take a token from the environment by itself.
    monkeypatch.setenv("HF_TOKEN", "hf_from_elsewhere")
    hub.add("org/model", model_files)
    read_bytes(pin_source("org/model", settings), settings, "config.json")
    assert not [request for request in hub.requests if "authorization" in request.headers]


def test_importing_the_package_loads_no_client() -> None:
    modules = ["source", "fetch", "dataset", "card", "client"]
    code = "import sys\n" + "".join(f"import pipeline.hub.{name}\n" for name in modules)
    code += "print(sorted({'huggingface_hub', 'httpx2', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert json.loads(done.stdout.replace("'", '"')) == []
