"""Bad input ends in an error that names the thing, the reason and the next step; nothing is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.acceptance.conftest import DEMO_MODEL, SMALL, Bitmill, files_below
from tests.s3_server import S3Server, careless_server, environment_for
from tests.small_disk import make_read_only, small_disk


def break_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[:8] = (1 << 60).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def name_absent_file(folder: Path) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def put_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", "architectures": ["X"]}))


@pytest.mark.parametrize(
    ("damage", "status", "words"),
    [
        (break_header, 3, ["model.safetensors"]),
        (truncate, 3, ["model.safetensors"]),
        (name_absent_file, 3, ["model.safetensors.index.json", "model-00002-of-00002.safetensors"]),
        (put_nan, 3, ["model.layers.1.mlp.up_proj.weight", "NaN"]),
        (only_pickle, 3, ["pytorch_model.bin", "save_pretrained"]),
        (no_weights, 3, ["safetensors"]),
        (unknown_architecture, 3, ["unheard_of"]),
    ],
)
def test_damaged_source_is_refused(
    damage: Callable[[Path], None], status: int, words: list[str], bitmill: Bitmill, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(DEMO_MODEL, source)
    damage(source)
    (tmp_path / "out").mkdir()
    done = bitmill("convert", source, "--variant", "gptq-w4-g128", *SMALL, "--to", tmp_path / "out")
    assert done.returncode == status, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert files_below(tmp_path / "out" / "refs") == []
    assert files_below(tmp_path / "out" / "releases") == []


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["./nowhere", "--variant", "gptq-w4-g128"], 3, ["./nowhere"]),
        (["SOURCE", "--variant", "gptq-w7-g128"], 2, ["gptq-w7-g128", "4"]),
        (["SOURCE", "--variant", "fancy"], 2, ["fancy", "gptq-w4-g128"]),
        (["SOURCE", "--spec", "FITS_NOTHING"], 4, ["quantize nothing", "256, 512"]),
        (["SOURCE", "--spec", "REFUSES"], 4, ["model.layers.0.self_attn.q_proj", "96"]),
        (["SOURCE", "--variant", "gptq-w4-g128", "--calibration", "SHORT"], 4, ["short.txt", "tokens"]),
        (["SOURCE", "--variant", "gptq-w4-g128", "--calibration", "./absent.txt"], 4, ["absent.txt"]),
        (["SOURCE", "--spec", "SPEC"], 2, ["spec.yaml", "smaples", "samples"]),
        (["SOURCE"], 2, ["--variant"]),
        (["SOURCE", "--variant", "gptq-w4-g128", "--release", "my team/model"], 2, ["'my team'", "--release"]),
    ],
)
def test_wrong_words_are_explained(
    arguments: list[str], status: int, words: list[str], bitmill: Bitmill, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "spec.yaml").write_text("variants: [gptq-w4-g128]\ncalibration: {smaples: 3}\n")
    variant = "variants: [{method: gptq, format: gptq, group_size: %d, group_fallback: %s}]\n"
    (tmp_path / "nothing.yaml").write_text(variant % (1024, "skip"))
    (tmp_path / "refuses.yaml").write_text(variant % (96, "refuse"))
    (tmp_path / "out").mkdir()
    specs = {"FITS_NOTHING": tmp_path / "nothing.yaml", "REFUSES": tmp_path / "refuses.yaml"}
    places = {**specs, "SOURCE": DEMO_MODEL, "SHORT": tmp_path / "short.txt", "SPEC": tmp_path / "spec.yaml"}
    done = bitmill("convert", *(places.get(word, word) for word in arguments), "--to", tmp_path / "out")
    assert done.returncode == status, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_target_folder_and_full_disk_are_named(bitmill: Bitmill, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    done = bitmill("convert", DEMO_MODEL, "--variant", "gptq-w4-g128", *SMALL, "--to", blocked)
    assert done.returncode == 6, done.stderr
    assert str(blocked) in done.stderr
    with small_disk(tmp_path / "small") as full:
        done = bitmill("convert", DEMO_MODEL, "--variant", "gptq-w4-g128", *SMALL, "--to", full)
        assert done.returncode == 6, done.stderr
        assert "storage.full" in done.stderr
        assert files_below(full / "refs") == []
        assert not list(full.glob("releases/**/manifest.json"))


def test_unreachable_hub_and_bucket_are_named(bitmill: Bitmill, tmp_path: Path) -> None:
    env = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": "us-east-1",
    }
    (tmp_path / "out").mkdir()
    done = bitmill("plan", "org/model", "--variant", "gptq-w4-g128", env=env)
    assert done.returncode == 3, done.stderr
    assert "127.0.0.1:9" in done.stderr
    done = bitmill("convert", DEMO_MODEL, "--variant", "gptq-w4-g128", *SMALL, "--to", "s3://nobody/x", env=env)
    assert done.returncode == 6, done.stderr
    assert "nobody" in done.stderr


def refuse_before_work(bitmill: Bitmill, target: str | Path, folder: Path, env: dict[str, str] | None = None) -> str:
    """Convert to a target that cannot be used; return what was said, having checked that nothing was computed."""
    work = folder / "work"
    options = ("--variant", "gptq-w4-g128", *SMALL, "--work-dir", work, "--to", target)
    done = bitmill("convert", DEMO_MODEL, *options, env=env)
    assert done.returncode == 6, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not work.exists()
    return done.stderr


def test_a_store_without_conditional_writes_is_refused_before_any_work(bitmill: Bitmill, tmp_path: Path) -> None:
    with careless_server(tmp_path / "served", "b-1") as endpoint:
        said = refuse_before_work(bitmill, "s3://b-1/models", tmp_path, environment_for(endpoint))
    assert "storage.no_conditional_writes" in said
    assert "s3://b-1/models does not honour conditional writes" in said


def test_a_missing_bucket_is_refused_before_any_work(bitmill: Bitmill, tmp_path: Path) -> None:
    with S3Server(tmp_path / "s3") as server:
        said = refuse_before_work(bitmill, "s3://not-there/models", tmp_path, server.environment)
        assert f"bucket 'not-there' at {server.endpoint}: no such bucket" in said
        assert f"aws s3 mb s3://not-there --endpoint-url {server.endpoint}" in said


def test_a_read_only_directory_is_refused_before_any_work(bitmill: Bitmill, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        make_read_only(disk)
        said = refuse_before_work(bitmill, disk, tmp_path)
        assert f"no access to {disk}: Read-only file system" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_refused_at_once_with_what_there_is(bitmill: Bitmill, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = bitmill(
        "convert", DEMO_MODEL, "--variant", "rtn-w8-g128", *SMALL, "--device", "cuda", "--to", tmp_path / "out"
    )
    assert done.returncode == 7, done.stderr
    assert "needs a GPU" in done.stderr
    assert "none that torch can use" in done.stderr
    assert "--device cpu" in done.stderr
