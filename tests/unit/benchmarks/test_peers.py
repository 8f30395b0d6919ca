"""The comparison with other tools: what is asked of them, how they are watched, how results are scored and kept."""

from __future__ import annotations

import math
import re
import shutil
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from benchmarks.peers.environments import pins_of
from benchmarks.peers.jobs import ROOT, Grid, Job, Task, Tokens, Tool, all_tasks, script_file, take_sequences
from benchmarks.peers.results import Results
from benchmarks.peers.runs import measure
from benchmarks.peers.scoring import Scorer, compare_logits
from pipeline.calibrate.tokens import Text, take_tokens
from pipeline.variants import parse_variant

PEERS = [tool for tool in Tool if tool is not Tool.BITMILL]
DEMO_MODEL = ROOT / "jobs" / "demo" / "model"


def codepoints(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_tokens_are_those_that_bitmill_takes(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Ä word, and another.\n" * 20, encoding="utf-8")
    taken = take_sequences(file, codepoints, samples=3, length=50)
    ours = take_tokens(Text(file.read_text(encoding="utf-8"), "text.txt"), codepoints, samples=3, length=50)
    assert taken == Tokens("text.txt", ours.tokens_NL.tolist(), ours.digest)


def test_short_text_gives_whole_sequences_or_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("x" * 99)
    assert len(take_sequences(file, codepoints, samples=3, length=40, or_fewer=True).sequences) == 2
    with pytest.raises(SystemExit, match="99 tokens, but 3 x 40 are needed"):
        take_sequences(file, codepoints, samples=3, length=40)
    with pytest.raises(SystemExit, match="99 tokens, but 3 x 100 are needed"):
        take_sequences(file, codepoints, samples=3, length=100, or_fewer=True)


@pytest.mark.parametrize("tool", PEERS)
def test_peer_has_a_script_and_nothing_but_pins(tool: Tool) -> None:
    pins = pins_of(tool)
    assert all(re.fullmatch(r"[a-zA-Z0-9._-]+==[0-9a-z.]+", pin) for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pins[0] in [word for word in project["dependencies"] if word.startswith("torch==")]
    assert pins[-1].partition("==")[0].replace("-", "") == tool
    assert script_file(tool).is_file()


def test_every_grid_is_made_by_bitmill_and_by_peers_under_names_of_their_own() -> None:
    tasks = all_tasks(iterations=20)
    assert len({task.name for task in tasks}) == len(tasks)
    for grid in {task.grid for task in tasks}:
        tools = {task.tool for task in tasks if task.grid == grid}
        assert Tool.BITMILL in tools
        assert len(tools) >= 3


def test_what_peers_make_in_another_dtype_is_told_from_what_they_make_by_default() -> None:
    default, float32 = (all_tasks(None, *dtype) for dtype in ((), ("float32",)))
    assert [task.tool for task in default] == [task.tool for task in float32]
    for task, other in zip(default, float32, strict=True):
        is_bitmill = task.tool is Tool.BITMILL
        assert (other.name == task.name) is (other.label == task.label) is (other == task) is is_bitmill
        assert is_bitmill or other.name == f"{task.name}-float32"


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("tool", PEERS)
def test_a_peer_s_script_is_told_the_dtype(tool: Tool, dtype: str) -> None:
    task = next(task for task in all_tasks(None, dtype) if task.tool is tool)
    job = Job(DEMO_MODEL, Path("text"), Tokens("text", [[1]], ""), Path("text"), 1, 2)
    assert job.as_json(task, Path("out"))["dtype"] == dtype
    assert 'dtype=job["dtype"]' in script_file(tool).read_text()


@pytest.mark.parametrize("task", [task for task in all_tasks(None) if task.tool is Tool.BITMILL], ids=lambda t: t.name)
def test_bitmills_variant_has_the_grid_of_its_task(task: Task) -> None:
    variant = parse_variant(task.variant)
    assert (variant.bits, variant.group_size, variant.symmetric) == (
        task.grid.bits,
        task.grid.group_size,
        task.grid.symmetric,
    )
    others = {other.method for other in all_tasks(None) if other.grid == task.grid and other.tool is Tool.GPTQMODEL}
    assert variant.format.value in others


def test_key_follows_the_tokens_the_model_and_the_cores(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, model)
    task = Task(Tool.GPTQMODEL, "gptq", Grid(4, 64, True))

    def key(tokens: str = "a", cores: int = 2, task: Task = task) -> str:
        return Job(model, Path("text"), Tokens("text", [[1]], tokens), Path("text"), 1, cores).key(task)

    first = key()
    assert key() == first
    others = {key(tokens="b"), key(cores=1), key(task=Task(Tool.GPTQMODEL, "gptq", Grid(3, 64, True)))}
    (model / "config.json").write_text("{}")
    assert len({first, *others, key()}) == 5


def test_measured_command_is_watched_with_its_children_and_nothing_of_it_stays(tmp_path: Path) -> None:
    left = tmp_path / "left"
    child = f"import time, pathlib; x = b'x' * 150_000_000; pathlib.Path({str(left)!r}).touch(); time.sleep(600)"
    leader = f"""
import subprocess, sys, time, pathlib
print("said")
subprocess.Popen([sys.executable, "-c", {child!r}])
until = time.process_time() + 0.5
while time.process_time() < until or not pathlib.Path({str(left)!r}).exists(): pass
time.sleep(0.3)
sys.exit(3)
"""
    start = time.monotonic()
    usage = measure([sys.executable, "-c", leader], {"PATH": "/usr/bin"}, tmp_path, tmp_path / "log")
    assert usage.exit_status == 3
    assert 0.8 <= usage.wall_s <= time.monotonic() - start
    assert 0.4 <= usage.cpu_s <= 2 * usage.wall_s
    assert usage.peak_bytes >= 150_000_000
    assert usage.private_bytes >= 150_000_000
    assert (tmp_path / "log").read_text() == "said\n"
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [words for words in running if str(left).encode() in words]


def test_score_is_what_the_definitions_say() -> None:
    generator = torch.Generator().manual_seed(0)
    source_LV, other_LV = torch.randn(2, 7, 11, generator=generator)
    targets = [3, 0, 10, 5, 5, 1, 2]
    source_nll, nll, kl, agreeing = compare_logits(source_LV, other_LV, torch.tensor(targets)).tolist()
    expected = [0.0, 0.0, 0.0, 0.0]
    for source_V, other_V, target in zip(source_LV.tolist(), other_LV.tolist(), targets, strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (source_V, other_V))
        expected[0] -= math.log(p[target])
        expected[1] -= math.log(q[target])
        expected[2] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected[3] += p.index(max(p)) == q.index(max(q))
    assert [source_nll, nll, kl, agreeing] == pytest.approx(expected, rel=1e-5)


def test_source_does_not_diverge_from_itself(tmp_path: Path) -> None:
    text = Tokens("text", [[5, 9, 200, 17, 42, 3, 7, 900]], "digest")
    (score,) = Scorer(DEMO_MODEL, tmp_path).score(DEMO_MODEL, [text])
    assert (score["kl"], score["agreement"], score["num_tokens"]) == (0.0, 1.0, 7)
    assert score["perplexity"] == score["source_perplexity"] > 1


def test_rows_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    results = Results(tmp_path)
    failed = {"kind": "run", "key": "a", "exit_status": 1, "said": ["no", "memory"]}
    done = {"kind": "run", "key": "a", "exit_status": 0}
    results.add(failed)
    assert (results.runs("a"), results.failure("a")) == ([], "exit status 1: no / memory")
    results.add(done)
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write('{"kind": "score", "key": "b", "k')
    again = Results(tmp_path)
    assert (again.runs("a"), again.failure("a"), again.score("b")) == ([done], "", None)
    again.add({"kind": "score", "key": "b", "kl": 0.5})
    assert Results(tmp_path).score("b") == {"kind": "score", "key": "b", "kl": 0.5}
