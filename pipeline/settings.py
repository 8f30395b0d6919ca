"""Endpoints, credentials and directories: the only reader of the environment.

Everything that affects the bytes of a release lives in the spec; what stands here only says where things are and who
we are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_HUB_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True)
class Settings:
    """Where to read from and write to, as the environment says it.

    Attributes:
        hub_endpoint: Base URL of the hub (``HF_ENDPOINT``).
        hub_token: Token for the hub (``HF_TOKEN``, else the file of ``hf auth login``), or None.
        cache_dir: Fetched source files, engine environments, copies of releases while they are verified
            (``BITMILL_CACHE``, default ``~/.cache/bitmill``).
        s3_endpoint: Endpoint URL for ``s3://`` targets (``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``), or None
            for AWS itself. Keys and region are read by boto3 from the environment as everywhere.
        ray_address: Cluster to join (``RAY_ADDRESS``), or None to start one on this machine.
    """

    hub_endpoint: str
    hub_token: str | None = field(repr=False)
    cache_dir: Path
    s3_endpoint: str | None
    ray_address: str | None


def load_settings() -> Settings:
    """Return the settings of this process, read from its environment now."""
    hub_home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    token_file = Path(os.environ.get("HF_TOKEN_PATH", hub_home / "token")).expanduser()
    token = os.environ.get("HF_TOKEN") or (token_file.read_text().strip() if token_file.is_file() else None)
    return Settings(
        hub_endpoint=os.environ.get("HF_ENDPOINT", DEFAULT_HUB_ENDPOINT).rstrip("/"),
        hub_token=token or None,
        cache_dir=Path(os.environ.get("BITMILL_CACHE", "~/.cache/bitmill")).expanduser(),
        s3_endpoint=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None,
        ray_address=os.environ.get("RAY_ADDRESS") or None,
    )


def quiet_ray() -> None:
    """Switch off Ray's usage reports and start-up notices for this process and the ones that it starts."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def engine_environment() -> dict[str, str]:
    """Return the environment that an engine's process runs in: ours, offline, without our credentials."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "HF_", "PYTHON"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
