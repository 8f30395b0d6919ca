"""Several hosts on one machine: network namespaces joined by a bridge, for tests of what crosses a network.

    with Hosts("store", "head", "one") as hosts:
        with hosts["store"].network():  # sockets that are opened here, and processes that are started, are that host's
            server = LoopbackHub(address=hosts["store"].address)
        driver = hosts["head"].start(["ray", "status"])
        hosts["one"].unplug()

Hosts reach each other at addresses of ``SUBNET`` and nothing else: there is no route to anywhere. Each has processes,
a host name, shared memory and a folder (``Host.folder``, the same path on all) of its own; of the file system they
share what they only read, such as the programs. All that runs on a host ends when its first process does, which ends
with the process that made it, however that ends. Needs root, ``ip`` and ``unshare``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

SUBNET = "10.77.0"
PREFIX = "bm"
CLONE_NEWNET = 0x40000000

FIRST_PROCESS = """
hostname "$0"
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$1"
ip link set lo up
echo ready
read -r _
"""
"""Of a host: ends when its standard input does, and the kernel ends all others of the host with it."""


def why_not() -> str:
    """Return why hosts cannot be made here; empty when they can."""
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed: apt-get install iproute2 util-linux mount"
    name = f"{PREFIX}-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here, which need root: {made.stderr.strip()}"
    try:
        flags = ["--fork", "--pid", "--mount", "--mount-proc", "--uts", "--ipc"]
        command = ["ip", "netns", "exec", name, "unshare", *flags, "true"]
        entered = subprocess.run(command, capture_output=True, text=True, check=False)
        return f"no process namespaces here: {entered.stderr.strip()}" if entered.returncode else ""
    finally:
        _ip("netns", "del", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _sweep() -> None:
    """Remove the namespaces that killed test runs left; nothing runs in them any more."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines()):
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == PREFIX and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            _ip("netns", "del", name)


@contextmanager
def _network(namespace: str) -> Iterator[None]:
    """Have this thread, and what it starts, in a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(descriptor: int) -> None:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")

    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        other = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        try:
            enter(other)
        finally:
            os.close(other)
        try:
            yield
        finally:
            enter(own)
    finally:
        os.close(own)


class Host:
    """A host.

    Attributes:
        name: Its name.
        address: Where the others reach it.
        folder: A folder that on every host is another one.
    """

    def __init__(self, name: str, address: str, folder: Path, run: str) -> None:
        self.name, self.address, self.folder = name, address, folder
        self._namespace, self._switch = f"{run}-{name}", f"{run}-switch"
        self._first: subprocess.Popen[str] | None = None
        self._pid = 0
        self._started: list[Process] = []

    def open(self) -> None:
        """Connect it to the switch and start its first process."""
        _ip("netns", "add", self._namespace)
        port = ("peer", "name", self.name, "netns", self._switch)
        _ip("link", "add", "eth0", "netns", self._namespace, "type", "veth", *port)
        _ip("-n", self._switch, "link", "set", "dev", self.name, "master", "bridge", "up")
        _ip("-n", self._namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self._namespace, "link", "set", "eth0", "up")
        separate = ["unshare", "--fork", "--pid", "--kill-child", "--mount", "--mount-proc", "--uts", "--ipc"]
        self._first = subprocess.Popen(
            ["ip", "netns", "exec", self._namespace, *separate, "sh", "-ec", FIRST_PROCESS, self.name, self.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._first.stdout is not None
        assert self._first.stdout.readline() == "ready\n", f"{self.name} did not start"
        (first,) = psutil.Process(self._first.pid).children()
        self._pid = first.pid

    def close(self) -> None:
        """End everything that runs on it, and remove it."""
        if self._first is not None:
            self._first.communicate(timeout=30)
        for process in self._started:
            process.wait(timeout=30)
        _ip("netns", "del", self._namespace)

    @contextmanager
    def network(self) -> Iterator[None]:
        """Have this thread, and what it starts, on the host's network, but in this machine's folders."""
        with _network(self._namespace):
            yield

    def path(self, below: str) -> Path:
        """Return where, seen from this machine, a path below the host's folder is."""
        return Path(f"/proc/{self._pid}/root") / (self.folder / below).relative_to("/")

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str], **options: Any) -> Process:
        """Start a command on the host."""
        enter = ["nsenter", f"--target={self._pid}", "--net", "--pid", "--mount", "--uts", "--ipc", "--"]
        self._started.append(Process([*enter, *command], env=dict(environment), **options))
        return self._started[-1]

    def unplug(self) -> None:
        """Cut its cable: what it sends, and what is sent to it, is lost without a word to either side."""
        _ip("-n", self._switch, "link", "set", "dev", self.name, "down")

    def plug(self) -> None:
        """Undo ``unplug``."""
        _ip("-n", self._switch, "link", "set", "dev", self.name, "up")


class Process(subprocess.Popen[str]):
    """A process on a host. It is the child of the one that is started, which only waits for it."""

    def __init__(self, command: Sequence[str | Path], **options: Any) -> None:
        super().__init__(command, text=True, **options)

    def crash(self) -> None:
        """Kill it, with no time for a last word."""
        for process in psutil.Process(self.pid).children():
            process.send_signal(signal.SIGKILL)
        self.wait(timeout=30)


class Hosts:
    """Hosts by name while the context lasts."""

    def __init__(self, *names: str) -> None:
        self._run = f"{PREFIX}-{os.getpid()}"
        self._names = names
        self._hosts: dict[str, Host] = {}
        self._stack = ExitStack()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __enter__(self) -> Self:
        _sweep()
        with ExitStack() as stack:
            # Sockets lie below it, and their paths must be short.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bm-", dir="/tmp")))
            switch = f"{self._run}-switch"
            _ip("netns", "add", switch)
            stack.callback(_ip, "netns", "del", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for number, name in enumerate(self._names, 1):
                host = Host(name, f"{SUBNET}.{number}", folder, self._run)
                stack.callback(host.close)
                host.open()
                self._hosts[name] = host
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
