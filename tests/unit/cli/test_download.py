"""``bitmill download``: a checked copy, for people and for scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli.main import run
from pipeline.settings import load_settings
from pipeline.storage.directory import DirectoryStore
from pipeline.storage.locate import locate_release, verify_release_files
from pipeline.storage.release import publish_release

FILES = {"config.json": "{}", "README.md": "# card", "model.safetensors": "weights" * 100}


@pytest.fixture
def release(tmp_path: Path) -> str:
    """The location of a release of three files."""
    folder = tmp_path / "made"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    target = DirectoryStore(tmp_path / "out")
    publish_release(target, folder, "org", "tiny-gptq", {"source": "x"}, file_names=FILES.keys(), verdict_passed=True)
    return f"{tmp_path / 'out'}/releases/org/tiny-gptq"


def test_a_download_is_a_release_and_its_folder_is_the_last_line(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copies" / "tiny"
    assert run(["download", release, str(copy)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{copy}\n"
    assert said.err.splitlines() == ["README.md (6 B)", "config.json (2 B)", "model.safetensors (700 B)"]
    assert {path.name: path.read_text() for path in copy.iterdir() if path.name in FILES} == FILES
    assert verify_release_files(locate_release(str(copy), load_settings())) == []


def test_a_second_download_copies_nothing_again(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["download", release, str(tmp_path / "copy")])
    (tmp_path / "copy" / "config.json").write_text("cut off")
    capsys.readouterr()
    assert run(["download", release, str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().err.splitlines() == ["config.json (2 B)"]


def test_json_says_what_was_copied_and_nothing_else(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["download", release, str(tmp_path / "copy"), "--json"]) == 0
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert said.err == ""
    assert len(answer.pop("revision")) == 64
    assert answer == {
        "release": "org/tiny-gptq",
        "directory": str(tmp_path / "copy"),
        "num_files": 3,
        "size_bytes": sum(len(text) for text in FILES.values()),
    }


def test_a_folder_with_other_things_is_left_alone(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    assert run(["download", release, str(tmp_path / "home")]) == 6
    said = capsys.readouterr()
    assert "storage.folder_in_use" in said.err
    assert "thesis.tex" in said.err
    assert said.out == ""
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_release_that_is_not_there_is_answered_with_those_that_are(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["download", release + "-typo", str(tmp_path / "copy")]) == 6
    assert "releases/org/tiny-gptq@main" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_a_damaged_file_ends_the_download_without_a_manifest(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (weights,) = Path(release).glob("*/model.safetensors")
    weights.write_text("WEIGHTS" * 100)
    assert run(["download", release, str(tmp_path / "copy")]) == 6
    assert "storage.corrupt_release" in capsys.readouterr().err
    assert not (tmp_path / "copy" / "manifest.json").exists()
