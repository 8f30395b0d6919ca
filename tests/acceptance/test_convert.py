"""``bitmill convert`` from end to end, to a directory, from a hub and to S3."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.acceptance.conftest import (
    DEMO_MODEL,
    ROOT,
    SMALL,
    VARIANTS,
    Bitmill,
    contents,
    environment,
    files_below,
    weights,
)
from tests.loopback_hub import LoopbackHub
from tests.s3_server import S3Server


def test_published_release_verifies_and_can_be_inspected(undisturbed: Path, bitmill: Bitmill) -> None:
    release = undisturbed / "releases" / "local" / "model-gptq-w4-g128"
    verified = bitmill("verify", release, "--json")
    assert verified.returncode == 0, verified.stderr
    checks = {check["name"]: check for check in json.loads(verified.stdout)["checks"]}
    assert list(checks) == ["digests", "structure", "scales", "generation"]
    assert checks["generation"]["detail"].startswith("3 recorded continuations: 96 of 96 greedy tokens")
    inspected = bitmill("inspect", f"{release}@main", "--modules")
    assert inspected.returncode == 0, inspected.stderr
    assert "model.layers.5.mlp.down_proj" in inspected.stdout
    facts = json.loads(bitmill("inspect", release, "--json").stdout)
    assert facts["variant"]["bits"] == 4
    (card,) = release.glob("*/README.md")
    assert bitmill("inspect", release, "--card").stdout == card.read_text()


def test_damaged_release_fails_verification(undisturbed: Path, bitmill: Bitmill, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(undisturbed, copy)
    (weights,) = copy.glob("releases/local/model-awq-w4-g128/*/model-00003-of-00007.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = bitmill("verify", copy / "releases" / "local" / "model-awq-w4-g128")
    assert done.returncode == 5
    assert "model-00003-of-00007.safetensors" in done.stdout


def test_plan_states_the_size_that_convert_writes(undisturbed: Path, bitmill: Bitmill) -> None:
    planned = bitmill("plan", DEMO_MODEL, *VARIANTS, "--json")
    assert planned.returncode == 0, planned.stderr
    for variant in json.loads(planned.stdout)["variants"]:
        (facts,) = undisturbed.glob(f"releases/local/model-{variant['name']}/*/bitmill.json")
        assert variant["size_bytes"] == json.loads(facts.read_text())["size_bytes"]


def test_the_least_memory_that_would_do_is_said_and_does_with_the_same_bytes(
    undisturbed: Path, bitmill: Bitmill, tmp_path: Path
) -> None:
    arguments = ["convert", DEMO_MODEL, *VARIANTS, *SMALL, "--to", tmp_path / "out", "--work-dir", tmp_path / "work"]
    refused = bitmill(*arguments, "--max-memory", "100MB")
    assert refused.returncode == 4, refused.stderr
    assert "--max-memory is 100 MB" in refused.stderr
    assert files_below(tmp_path / "out" / "releases") == []
    least = re.search(r"give workers at least ([\d.]+ MB)", refused.stderr)
    assert least, refused.stderr
    # What is said is rounded.
    megabytes = 1 + float(least[1].removesuffix(" MB"))
    done = bitmill(*arguments, "--max-memory", f"{megabytes}MB")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(undisturbed)
    assert "a worker took" not in done.stderr


def test_two_runs_at_once_in_one_work_directory_do_not_disturb_each_other(undisturbed: Path, tmp_path: Path) -> None:
    """They calibrate alike, save the same hidden states, and the one that ends first drops them."""
    target, work = tmp_path / "out", tmp_path / "work"
    target.mkdir()
    places = ("--to", str(target), "--work-dir", str(work))
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "convert", str(DEMO_MODEL), "--variant", variant, *SMALL, *places],
            cwd=ROOT,
            env=environment(tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variant in ("gptq-w4-g128", "awq-w4-g128")
    ]
    for run in runs:
        _, stderr = run.communicate(timeout=280)
        assert run.returncode == 0, stderr
    assert weights(target) == weights(undisturbed)


def test_hub_source_is_pinned_and_published_to_s3(undisturbed: Path, bitmill: Bitmill, tmp_path: Path) -> None:
    with LoopbackHub(token="secret") as hub, S3Server(tmp_path / "s3") as s3:
        files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}
        commit = hub.add("org/tiny", files)
        s3.make_bucket("models")
        env = {**s3.environment, **hub.environment(tmp_path / "cache"), "HF_TOKEN": "secret"}
        arguments = ("org/tiny", "--variant", "gptq-w4-g128", *SMALL)
        planned = bitmill("plan", *arguments, "--json", env=env)
        assert planned.returncode == 0, planned.stderr
        assert json.loads(planned.stdout)["commit"] == commit
        done = bitmill("convert", *arguments, "--to", "s3://models/quantized", env=env)
        assert done.returncode == 0, done.stderr
        uri = done.stdout.splitlines()[-1]
        assert uri.startswith("s3://models/quantized/releases/org/tiny-gptq-w4-g128/")
        verified = bitmill("verify", "s3://models/quantized/releases/org/tiny-gptq-w4-g128@main", env=env)
        assert verified.returncode == 0, verified.stdout + verified.stderr
        body = s3.client().get_object(Bucket="models", Key=uri.removeprefix("s3://models/") + "/bitmill.json")["Body"]
        assert json.loads(body.read())["source"]["commit"] == commit


def test_failed_gate_publishes_nothing(bitmill: Bitmill, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("gates: {max_kl: 1.0e-9, prompts: [{prompt: Hello, expect: '^no such text$'}]}\n")
    (tmp_path / "out").mkdir()
    done = bitmill("convert", DEMO_MODEL, "--variant", "rtn-w4-g128", *SMALL, "--spec", spec, "--to", tmp_path / "out")
    assert done.returncode == 5, done.stderr
    assert done.stdout == ""
    assert "divergence: KL" in done.stderr
    assert "does not match" in done.stderr
    assert files_below(tmp_path / "out" / "refs") == []
    assert files_below(tmp_path / "out" / "releases") == []
