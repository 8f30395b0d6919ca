"""Endpoints, credentials and directories: the only reader of the environment.

Everything that affects the bytes of a release lives in the spec; what stands here only says where things are and who
we are. A variable that is empty counts as not set.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import SourceError, SpecError

DEFAULT_HUB_ENDPOINT = "https://huggingface.co"
DEFAULT_HUB_HOME = "~/.cache/huggingface"
DEFAULT_CACHE = "~/.cache/bitmill"

_ENGINE_VARIABLES = frozenset({"PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH"})
_ENGINE_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "VLLM_")
_SECRET_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""VLLM_API_KEY, for one, has a prefix that engines need."""


@dataclass(frozen=True)
class Settings:
    """Where to read from and write to, as the environment says it.

    Attributes:
        hub_endpoint: Base URL of the hub (``HF_ENDPOINT``).
        hub_token: Token for the hub (``HF_TOKEN``), or None to look into ``hub_token_file``.
        cache_dir: Fetched source files, engine environments, copies of releases while they are verified
            (``BITMILL_CACHE``, default ``~/.cache/bitmill``).
        s3_endpoint: Endpoint URL for ``s3://`` targets (``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``), or None
            for AWS itself. Keys and region are read by boto3 from the environment as everywhere.
        ray_address: Cluster to join (``RAY_ADDRESS``), or None to start one on this machine.
        hub_token_file: Where ``hf auth login`` leaves a token (``HF_TOKEN_PATH``, default ``token`` in ``HF_HOME``), or
            None to read anonymously. Read when a hub is contacted and not before: whatever is wrong with it is nothing
            to a local source.
    """

    hub_endpoint: str
    hub_token: str | None = field(repr=False)
    cache_dir: Path
    s3_endpoint: str | None
    ray_address: str | None
    hub_token_file: Path | None = None

    def find_hub_token(self) -> str | None:
        """Return the token to show to the hub, or None to read anonymously.

        Raises:
            SourceError: when the token file cannot be read, or what it or ``HF_TOKEN`` holds is no token.
        """
        if self.hub_token is not None:
            return _require_token(self.hub_token, "HF_TOKEN")
        if self.hub_token_file is None:
            return None
        try:
            text = self.hub_token_file.expanduser().read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else _reason(error)
            raise SourceError(
                f"the hub token in {self.hub_token_file} cannot be read: {reason}",
                code="source.token",
                hint="run: hf auth login (or set HF_TOKEN; HF_TOKEN_PATH and HF_HOME say where the file is)",
            ) from error
        return _require_token(text, str(self.hub_token_file)) if text else None


def load_settings() -> Settings:
    """Return the settings of this process, read from its environment now.

    Raises:
        SpecError: when the cache directory is under a home folder that does not exist.
    """
    hub_home = Path(_variable("HF_HOME") or DEFAULT_HUB_HOME)
    return Settings(
        hub_endpoint=(_variable("HF_ENDPOINT") or DEFAULT_HUB_ENDPOINT).rstrip("/"),
        hub_token=_variable("HF_TOKEN"),
        cache_dir=_cache_dir(),
        s3_endpoint=_variable("AWS_ENDPOINT_URL_S3") or _variable("AWS_ENDPOINT_URL"),
        ray_address=_variable("RAY_ADDRESS"),
        hub_token_file=Path(_variable("HF_TOKEN_PATH") or hub_home / "token"),
    )


def _variable(name: str) -> str | None:
    """Return the value of an environment variable without white space around it, None when nothing is left."""
    return os.environ.get(name, "").strip() or None


def _cache_dir() -> Path:
    text = _variable("BITMILL_CACHE") or DEFAULT_CACHE
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise SpecError(
            f"the cache directory {text} cannot be found: {_reason(error)}",
            code="spec.cache",
            hint="set BITMILL_CACHE to a folder on a disk with space",
        ) from error


def _require_token(text: str, where: str) -> str:
    """Return the token, refused when it could not be sent; what it is never enters the message."""
    if not re.fullmatch(r"[!-~]+", text):
        raise SourceError(
            f"the hub token in {where} has characters that no token has, such as blanks or line breaks",
            code="source.token",
            hint="run: hf auth login (or set HF_TOKEN to the token alone)",
        )
    return text


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).rstrip(".")


def quiet_ray(*, on_loopback: bool) -> None:
    """Switch off Ray's usage reports and start-up notices for this process and the ones that it starts.

    To be called before ``ray`` is imported, which reads the environment once.

    Args:
        on_loopback: Whether what this process starts of Ray listens on the loopback interface only. Ray's own default
            are all interfaces, with ports through which anybody can have code run.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if on_loopback:
        # Whether machines may form a cluster, on any system despite the name; if not, this one is called 127.0.0.1,
        # and Ray's servers listen where their machine's name points to.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # The log monitor looks for new files all the time, which takes a hundredth of a core, and nobody reads what it
        # finds. From so many files on it looks only once in so many seconds.
        os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
        os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "10")


def ray_uses_tls() -> bool:
    """Return whether Ray's processes are told to talk over TLS (``RAY_USE_TLS``), where nobody else can take part."""
    return os.environ.get("RAY_USE_TLS", "0") not in ("", "0")


def engine_environment(hub_home: Path) -> dict[str, str]:
    """Return the environment that an engine's process runs in: offline, and without credentials of ours.

    Of our own environment it gets only what is known to be needed, since a secret can have any name.

    Args:
        hub_home: An empty folder for the engine's hub client, which would find our login in ours.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith(_ENGINE_PREFIXES) and not name.endswith(_SECRET_ENDINGS)) or name in _ENGINE_VARIABLES
    }
    return {**kept, "HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
