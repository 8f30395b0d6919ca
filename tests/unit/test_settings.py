"""The environment, read once and in one place."""

from __future__ import annotations

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


def test_an_engine_runs_offline_and_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = engine_environment()
    assert "secret" not in found.values()
    assert found["HF_HUB_OFFLINE"] == "1"
