"""The environment, read once and in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    (tmp_path / "token").write_text("logged-in\n")
    assert load_settings().hub_token == "logged-in"
    monkeypatch.setenv("HF_TOKEN", "given")
    assert load_settings().hub_token == "given"
    assert "given" not in repr(load_settings())


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
