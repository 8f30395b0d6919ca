"""A conversion under a storm of kills ends in the same bytes as an undisturbed one.

At random moments of a seeded sequence, mostly while units run, SIGKILL hits a worker, the raylet, the GCS or the
driver; whenever the driver has ended, one stored file of the work directory gets a byte flipped, and the same command
is started again, with whatever the last one left behind still alive. When a conversion ends before enough kills have
hit, another begins in a fresh work directory. Once they have, the storm is over and the conversion may end.

Exits with 1 when published bytes differ and with 2 when the time was not enough. From the repository root:
``.venv/bin/python benchmarks/chaos.py [--kills 30] [--minutes 40] [--seed 0]``, or ``make chaos``.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from conversions import POLL_S, Conversion, Job, release_digests
from flags import add_model, job_parser, scratch_folder, the_job
from models import Shape
from report import print_header, print_table
from sessions import Role, kill_process, processes_of

from pipeline.storage.work import RECORD_NAME

WEIGHTS = {Role.WORKER: 5, Role.DRIVER: 2, Role.RAYLET: 2, Role.GCS: 1}
"""How often each kind is hit, of those that are alive."""

START_SHARE = 0.2
"""Share of the drivers that are hit from their first moment on. The others are spared until something of theirs has
finished: starting takes longer than kills are apart, and a storm that never lets anybody start tests nothing else."""

KEPT_SESSIONS = 2
"""Sessions whose processes may live: that of the running driver, and what the one before left behind."""


@dataclass
class Storm:
    """What hits a job, and what came of it.

    Attributes:
        kills: Processes killed, by role.
        flips: Stored files that got a byte flipped.
        noticed: Damaged stages that a conversion told of.
        endings: How drivers ended that were started.
        orphans: Processes that outlived their driver and the one after it.
        longest_quiet_s: Longest time without an event while a driver ran.
    """

    job: Job
    workers: int
    num_kills: int
    pause_s: float
    end_s: float
    chance: random.Random
    flips_records: bool
    kills: Counter[Role] = field(default_factory=Counter)
    flips: int = 0
    noticed: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    orphans: int = 0
    longest_quiet_s: float = 0.0
    _next_s: float = 0.0
    _left: deque[Conversion] = field(default_factory=deque)

    def blow_over(self, place: Path) -> None:
        """Convert in a fresh place, restarting until a driver ends well.

        Raises:
            TimeoutError: when the time is over.
        """
        while True:
            run = Conversion(self.job, place, self.workers)
            self._left.append(run)
            while len(self._left) > KEPT_SESSIONS:
                old = self._left.popleft()
                self.orphans += sum(1 for _ in processes_of(old.session))
                old.close()
            if self._disturb(run):
                return
            self._flip(place / "work")

    def calm(self) -> None:
        """End every process that is left."""
        while self._left:
            self._left.popleft().close()

    @property
    def is_over(self) -> bool:
        """Whether enough kills have hit."""
        return self.kills.total() >= self.num_kills

    def _disturb(self, run: Conversion) -> bool:
        """Kill until the driver has ended; return whether it had done everything."""
        started_s, is_hit = time.monotonic(), False
        self._next_s = math.inf
        spares_start = self.chance.random() >= START_SHARE
        while run.is_running:
            now_s = time.monotonic()
            if self._next_s == math.inf and not (spares_start and run.num_finished == 0):
                self._draw_moment()
            if now_s > self.end_s:
                raise TimeoutError(f"the time is over; the last driver has run for {now_s - started_s:.0f} s")
            if not self.is_over and now_s > self._next_s:
                is_hit |= self._kill(run.session) is Role.DRIVER
                self._draw_moment()
            last_s = run.events[-1][0] if run.events else started_s
            self.longest_quiet_s = max(self.longest_quiet_s, now_s - last_s)
            time.sleep(POLL_S)
        run.settle()
        warnings = [event["message"] for _, event in run.events if event["event"] == "warned"]
        self.noticed += sum("damaged" in message for message in warnings)
        ending = self._ending(run, is_hit)
        self.endings[ending] += 1
        print(f"driver ended: {ending}, {run.share_done:.0%} of its units done, {self.kills.total()} kills", flush=True)
        return ending == "done"

    def _ending(self, run: Conversion, is_hit: bool) -> str:
        failures = [event["code"] for _, event in run.events if event["event"] == "failed"]
        if failures:
            return failures[-1]
        if is_hit:
            return "killed"
        # Nobody but Ray is left who could have ended it without a word of ours.
        status = run.exit_status
        return "done" if status == 0 else f"status {status} without a reason: {' | '.join(run.talk[-3:])[-300:]}"

    def _draw_moment(self) -> None:
        self._next_s = time.monotonic() + self.chance.expovariate(1 / self.pause_s)

    def _kill(self, session: int) -> Role | None:
        """Kill a process of a session, and return what it was."""
        alive = [process for process in processes_of(session) if process.role in WEIGHTS]
        roles = sorted({process.role for process in alive})
        if not roles:
            return None
        (role,) = self.chance.choices(roles, [WEIGHTS[role] for role in roles])
        victim = self.chance.choice(sorted(process.pid for process in alive if process.role is role))
        if not kill_process(victim, session):
            return None
        self.kills[role] += 1
        return role

    def _flip(self, work: Path) -> None:
        """Flip a bit of a finished stage's file. No driver runs: a file that is already mapped is nobody's to check."""
        files = [path for path in work.glob("*/*/*/**/*") if path.is_file() and path.stat().st_size]
        wanted = sorted(path for path in files if self.flips_records or path.name != RECORD_NAME)
        if not wanted:
            return
        path = self.chance.choice(wanted)
        position = self.chance.randrange(path.stat().st_size)
        with path.open("r+b") as handle:
            handle.seek(position)
            (byte,) = handle.read(1)
            handle.seek(position)
            handle.write(bytes([byte ^ 1 << self.chance.randrange(8)]))
        self.flips += 1


def main() -> None:
    parser = job_parser(__doc__, variants=["gptq-w4-g64", "awq-w4-g64"], samples=64, length=256)
    add_model(parser, Shape(layers=12, hidden=512, intermediate=1408))
    parser.add_argument("--workers", type=int, default=2, help="default 2")
    parser.add_argument("--kills", type=int, default=30, help="default 30")
    parser.add_argument("--pause", type=float, default=8.0, help="mean seconds from one kill to the next, default 8")
    parser.add_argument("--minutes", type=float, default=40.0, help="longest time of the storm, default 40")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", action="store_true", help="flip bits of stages' records too")
    args = parser.parse_args()
    print_header()
    with scratch_folder(args) as folder:
        job = the_job(args, folder)
        with Conversion(job, folder / "undisturbed", args.workers) as run:
            timing = run.finish()
        print(f"undisturbed: {timing.num_units} units, {timing.whole_s:.0f} s", flush=True)
        expected = release_digests(folder / "undisturbed")
        end_s = time.monotonic() + 60 * args.minutes
        chance = random.Random(args.seed)
        storm = Storm(job, args.workers, args.kills, args.pause, end_s, chance, args.records)
        status = _weather(storm, expected, folder)
    sys.exit(status)


def _weather(storm: Storm, expected: dict[str, str], folder: Path) -> int:
    """Convert under the storm until it is over, say what came of it, and return the exit status."""
    began_s = time.monotonic()
    rounds, differing, reason = 0, list[str](), ""
    try:
        while not storm.is_over and not differing:
            place = folder / f"storm-{rounds}"
            storm.blow_over(place)
            rounds += 1
            found = release_digests(place)
            differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    except TimeoutError as error:
        reason = str(error)
    finally:
        storm.calm()
    rows = [[f"killed: {role}", str(storm.kills[role])] for role in WEIGHTS]
    rows += [["killed: all", str(storm.kills.total())]]
    rows += [["stored files damaged", str(storm.flips)], ["damage told of", str(storm.noticed)]]
    rows += [[f"drivers ended: {ending:.100}", str(number)] for ending, number in storm.endings.most_common()]
    rows += [["processes that outlived two drivers", str(storm.orphans)]]
    rows += [
        ["conversions completed", str(rounds)],
        ["longest time without an event, s", f"{storm.longest_quiet_s:.0f}"],
    ]
    print_table(["what", "count"], [*rows, ["minutes", f"{(time.monotonic() - began_s) / 60:.1f}"]])
    if differing:
        print(f"DIFFERENT from the undisturbed run: {', '.join(differing)}")
        return 1
    if reason or not expected:
        print(f"UNFINISHED: {reason or 'the undisturbed run published nothing'}")
        return 2
    print(f"IDENTICAL: {len(expected)} published files, byte for byte, in {rounds} conversion(s)")
    return 0


if __name__ == "__main__":
    main()
