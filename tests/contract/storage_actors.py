"""What the storage suites run in processes of their own: writers that race, and writers that are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from pipeline.errors import ConflictError, StorageError
from pipeline.settings import load_settings
from pipeline.storage.directory import DirectoryStore
from pipeline.storage.objects import ObjectStore, open_store
from pipeline.storage.release import publish_release
from pipeline.storage.s3 import S3Store
from pipeline.storage.temporaries import exclusive_lock
from pipeline.storage.work import open_work_store
from pipeline.storage.work_directory import DirectoryWorkStore
from pipeline.storage.work_objects import ObjectWorkStore

PROVENANCE = {"source": "org/model", "commit": "c" * 40, "settings": {"bits": 4, "damping": 0.01}}
PART_BYTES = 5 << 20


def process_context() -> ForkServerContext:
    """Processes that start in milliseconds, from a server that has loaded this module and boto3 but no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.storage.s3", "tests.contract.storage_actors"])
    return context


def open_for_test(url: str) -> ObjectStore:
    """Open a store; S3 uploads use the smallest parts, so that small files are multipart uploads."""
    store = open_store(url, load_settings())
    if isinstance(store, S3Store):
        store.part_bytes = PART_BYTES
    return store


def file_names(folder: Path) -> frozenset[str]:
    """Return the files of a folder, relative to it, as the converter that wrote them would name them."""
    return frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def race_to_put(url: str, key: str, writer: int, condition: dict[str, Any], barrier: Any, answers: Any) -> None:
    """Write once everybody is ready, and report whether we were told that we won."""
    store = open_for_test(url)
    barrier.wait()
    try:
        store.put(key, f"written by {writer}".encode(), **condition)
    except ConflictError:
        answers.put((writer, False))
    else:
        answers.put((writer, True))


def publish_and_die(url: str, folder: str, environment: dict[str, str], step: int) -> None:
    """Publish, and be killed right before the given step (1 is the first)."""
    os.environ.update(environment)
    store = open_for_test(url)
    fuse = Fuse(step)
    if isinstance(store, S3Store):
        fuse.burn_with_requests(store)
    else:
        fuse.burn_with_disk(url)
    publish_release(
        store,
        Path(folder),
        "org",
        "model-GPTQ",
        PROVENANCE,
        file_names=file_names(Path(folder)),
        verdict_passed=True,
    )


def finish_and_die(url: str, cache: str, environment: dict[str, str], stage: str, key: str, step: int) -> None:
    """Write a stage, and be killed right before the given step; on disk and towards the service, all steps count."""
    os.environ.update(environment | {"BITMILL_CACHE": cache})
    store = open_work_store(url, load_settings())
    fuse = Fuse(step)
    if isinstance(store, ObjectWorkStore):
        assert isinstance(store.store, S3Store)
        fuse.burn_with_requests(store.store)
    fuse.burn_with_disk(url, cache)
    with store.writing(stage, key) as writer:
        writer.path("codes.bin").write_bytes(b"codes" * 1000)
        writer.finish({"loss": 0.5})


def race_to_finish(
    url: str, cache: str, environment: dict[str, str], stage: str, key: str, barrier: Any, answers: Any
) -> None:
    """Write the same stage as everybody else at the same time."""
    os.environ.update(environment | {"BITMILL_CACHE": cache})
    store = open_work_store(url, load_settings())
    with store.writing(stage, key) as writer:
        writer.path("codes.bin").write_bytes(b"codes" * 1000)
        barrier.wait()
        answers.put(writer.finish({"loss": 0.5}).model_dump())


def write_as_another_user(user: int, root: str, answers: Any) -> None:
    """Without rights of our own, put an object and finish a stage; report the error or an empty text."""
    _become(user)
    try:
        DirectoryStore(Path(root)).put("releases/second", b"y")
        with DirectoryWorkStore(Path(root, "work")).writing("solve", "ef" * 32) as writer:
            writer.finish({})
    except StorageError as error:
        answers.put(str(error))
    else:
        answers.put("")


def hold_as_another_user(user: int, lock: str, is_held: Any, may_end: Any) -> None:
    """Hold a lock file that somebody else made, until we are told to let go of it."""
    _become(user)
    with exclusive_lock(Path(lock)):
        is_held.set()
        may_end.wait(60)


def _become(user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


class Fuse:
    """Kills this process right before a step of what it does, 1 being the first."""

    def __init__(self, step: int) -> None:
        self._left = step

    def burn_with_requests(self, store: S3Store) -> None:
        """Every request of a store counts as one step."""
        store._client.meta.events.register("before-send.s3", self._burn)

    def burn_with_disk(self, *folders: str) -> None:
        """Every change of the file system under the folders counts as one step, whoever asks for it."""

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir"):
                return
            if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if any(str(argument).startswith(folders) for argument in arguments[:2]):
                self._burn()

        sys.addaudithook(audit)

    def _burn(self, **_: Any) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
