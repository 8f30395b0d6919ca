"""The environment, read once and in one place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, SourceError
from pipeline.settings import engine_environment, load_settings

VARIABLES = (
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HOME",
    "BITMILL_CACHE",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "RAY_ADDRESS",
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def test_defaults_hold_no_token_and_no_endpoint() -> None:
    settings = load_settings()
    assert settings.hub_endpoint == "https://huggingface.co"
    assert (settings.hub_token, settings.s3_endpoint, settings.ray_address) == (None, None, None)
    assert settings.cache_dir == Path("~/.cache/bitmill").expanduser()


def test_a_token_in_the_environment_wins_over_the_one_that_was_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_settings().find_hub_token() is None
    (tmp_path / "token").write_text("logged-in\n")
    assert load_settings().find_hub_token() == "logged-in"
    monkeypatch.setenv("HF_TOKEN", " given\n")
    assert load_settings().find_hub_token() == "given"
    assert "given" not in repr(load_settings())
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").write_text("other")
    assert load_settings().find_hub_token() == "other"
    (tmp_path / "elsewhere").write_text("\n")
    assert load_settings().find_hub_token() is None


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_is_as_good_as_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("of-something-else")
    monkeypatch.delenv("HF_HOME")
    unset = load_settings()
    monkeypatch.setenv(name, "")
    assert load_settings() == unset
    assert load_settings().find_hub_token() is None


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff\xfe", "not UTF-8"), (b"hf_a\nhf_b", "characters that no token has")]
)
def test_a_token_file_is_only_read_for_a_hub_and_named_when_it_is_no_token(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "token").write_bytes(content)
    settings = load_settings()
    with pytest.raises(SourceError) as caught:
        settings.find_hub_token()
    assert str(tmp_path / "token") in caught.value.message
    assert reason in caught.value.message
    assert "hf_a" not in caught.value.message
    assert "hf auth login" in caught.value.hint


def test_a_token_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "token").symlink_to(tmp_path / "token")
    with pytest.raises(SourceError, match=f"{tmp_path}/token cannot be read: Too many levels"):
        load_settings().find_hub_token()


def test_a_token_with_something_inside_that_no_header_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a\nhf_b")
    with pytest.raises(SourceError, match="HF_TOKEN has characters that no token has") as caught:
        load_settings().find_hub_token()
    assert "hf_a" not in str(caught.value)


@pytest.mark.parametrize("name", ["BITMILL_CACHE", "HF_HOME", "HF_TOKEN_PATH"])
def test_a_home_folder_that_is_not_there_is_refused_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "~nosuchuser123/x")
    with pytest.raises(PipelineError, match="~nosuchuser123/x") as caught:
        load_settings().find_hub_token()
    assert name in str(caught.value)


def test_endpoints_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:2")
    assert load_settings().hub_endpoint == "http://127.0.0.1:1"
    assert load_settings().s3_endpoint == "http://127.0.0.1:2"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:3")
    assert load_settings().s3_endpoint == "http://127.0.0.1:3"


SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "GITHUB_TOKEN",
    "OPENAI_API_KEY",
    "VLLM_API_KEY",
    "DATABASE_PASSWORD",
    "PIP_INDEX_URL",
    "HTTPS_PROXY",
    "SSH_AUTH_SOCK",
    "PYTHONPATH",
)
KEPT = {
    "PATH": "/usr/bin",
    "HOME": "/home/somebody",
    "LANG": "C.UTF-8",
    "LC_ALL": "C",
    "TMPDIR": "/var/tmp",
    "LD_LIBRARY_PATH": "/opt/lib",
    "CUDA_VISIBLE_DEVICES": "1",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "OMP_NUM_THREADS": "4",
    "MKL_NUM_THREADS": "4",
    "VLLM_USE_V1": "1",
}


def test_an_engine_gets_what_it_needs_to_run_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        monkeypatch.delenv(name)
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    for name, value in KEPT.items():
        monkeypatch.setenv(name, value)
    own = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    assert engine_environment(tmp_path) == {**KEPT, **own}


def test_an_engine_s_hub_client_finds_no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("home/.cache/huggingface", "hub"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home/.cache/huggingface/token").write_text("hf_secret")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HOME")
    code = "import huggingface_hub; print(huggingface_hub.get_token())"
    ours = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ours.stdout == "hf_secret\n"
    env = engine_environment(tmp_path / "hub")
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert theirs.stdout == "None\n"
