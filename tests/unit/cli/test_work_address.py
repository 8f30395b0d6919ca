"""What ``--work-dir`` takes."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from jobs.cli.convert import WorkAddress


def test_directories_and_buckets_are_taken_as_they_are(tmp_path: Path) -> None:
    for address in (str(tmp_path), str(tmp_path / "new"), "work", "s3://bucket", "s3://bucket/a/prefix"):
        assert WorkAddress().convert(address, None, None) == address


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(click.BadParameter, match="is a file"):
        WorkAddress().convert(str(tmp_path / "file"), None, None)
