"""`rlbal sweep`: run what is left of a sweep, each run in a process of its own, and compare."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlbal.errors import RlbalError, RunError, TrainingStopped
from rlbal.evaluation_view import printable
from rlbal.experiments.progress import SweepProgress
from rlbal.experiments.results import SWEEP_RECORD, unfinished
from rlbal.experiments.sweep import Planned, Sweep, SweepRun, plan, read_sweep, refuse_differing, resolve_runs
from rlbal.recipe_file import dump_yaml
from rlbal.run import write_whole

POLL_SECONDS = 0.2
LOG_LINES = 3


@dataclass(frozen=True)
class Child:
    """A run in progress; `slot` numbers the runs at once."""

    run: SweepRun
    process: "subprocess.Popen[bytes]"
    slot: int
    started: float


@dataclass
class Interruption:
    """Ctrl-C or SIGTERM: how often so far."""

    count: int = 0
    _previous: dict[int, Any] = field(default_factory=dict)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def run_sweep(path: Path, overrides: list[str], overwrite: bool, dry_run: bool, parallel: int | None = None) -> None:
    """Do what is left of a sweep, then compare its arms.

    Args:
        path: the sweep file.
        overrides: `key.sub=value` for all arms.
        overwrite: do runs of another recipe again instead of refusing.
        dry_run: print the runs and their state, and stop.
        parallel: runs at once instead of the file's.

    Raises:
        RlbalError: a recipe that is refused, runs of another recipe in the way, or runs that failed.
        TrainingStopped: the user interrupted.
    """
    sweep = read_sweep(path, parallel)
    runs = resolve_runs(sweep, overrides)
    console = Console(highlight=False)
    if dry_run:
        _list_runs([plan(run, overwrite) for run in runs], console)
        return
    with _only_one(Path(sweep.output_dir)) as lock:
        planned = [plan(run, overwrite) for run in runs]
        refuse_differing(planned)
        _record(sweep, runs)
        with Interruption() as interruption:
            failed = _Runner(sweep, planned, interruption, console, lock).run()
    left = [run for run in runs if not run.directory.is_run or unfinished(run.directory, run.recipe)]
    if interruption.count and left:
        again = shlex.join(["rlbal", "sweep", str(path), *overrides])
        raise TrainingStopped(
            f"stopped with {len(runs) - len(left)} of {len(runs)} runs finished", fix=f"continue: {again}"
        )
    _compare([run.directory.path for run in runs if run not in left], console)
    if failed:
        raise RunError(_failures(failed, len(runs)), fix="`rlbal sweep` again does the failed runs only")


def _list_runs(planned: list[Planned], console: Console) -> None:
    table = Table("run", "state", box=box.SIMPLE_HEAD, pad_edge=False)
    for item in planned:
        table.add_row(item.run.label, item.describe())
    console.print(table)


def _record(sweep: Sweep, runs: list[SweepRun]) -> None:
    """Write the sweep, whose order of arms `rlbal compare` follows, and the recipe of every run."""
    try:
        for run in runs:
            run.recipe_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(run.recipe_file, run.recipe.dump())
        write_whole(Path(sweep.output_dir) / SWEEP_RECORD, dump_yaml(sweep.model_dump(mode="json")))
    except OSError as error:
        raise RunError(f"cannot write to {sweep.output_dir}", str(error), "choose another `output_dir`") from None


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Hold a sweep's folder. The runs inherit the lock, so it is held until the last of them has ended.

    Raises:
        RunError: another sweep holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"cannot write to {folder}", str(error), "choose another `output_dir`") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another sweep, or a run that one has started, is at work in {folder}",
                fix="wait for it, stop it, or choose another `output_dir`",
            ) from None
        yield lock
    finally:
        os.close(lock)


class _Runner:
    """Keeps `parallel` runs going until all are done or the user stops it."""

    def __init__(
        self, sweep: Sweep, planned: list[Planned], interruption: Interruption, console: Console, lock: int
    ) -> None:
        self.sweep, self.interruption, self.lock = sweep, interruption, lock
        self.waiting = [item for item in planned if item.state != "finished"]
        self.children: list[Child] = []
        self.failed: list[SweepRun] = []
        self.passed_on = 0
        self.progress = SweepProgress(console, len(planned), len(planned) - len(self.waiting))

    def run(self) -> list[SweepRun]:
        """Returns the runs that failed."""
        with self.progress:
            while self.children or (self.waiting and not self.interruption.count):
                while self.waiting and len(self.children) < self.sweep.parallel and not self.interruption.count:
                    self._start(self.waiting.pop(0))
                self._pass_on_interruption()
                time.sleep(POLL_SECONDS)
                for child in [child for child in self.children if child.process.poll() is not None]:
                    self._end(child)
                self.progress.update([child.run for child in self.children])
        return self.failed

    def _start(self, item: Planned) -> None:
        run, resume = item.run, item.state == "resume"
        slot = next(slot for slot in range(self.sweep.parallel) if slot not in {child.slot for child in self.children})
        with run.log.open("ab" if resume else "wb") as log:
            process = subprocess.Popen(
                command(run, resume),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.sweep, run, slot),
                start_new_session=True,  # Ctrl-C reaches it through us alone
                pass_fds=[self.lock],
            )
        self.children.append(Child(run, process, slot, time.monotonic()))
        self.progress.started(run, item.describe().removeprefix("to be "))

    def _end(self, child: Child) -> None:
        self.children.remove(child)
        done = child.run.directory.is_run and unfinished(child.run.directory, child.run.recipe) is None
        if not done and not self.interruption.count:
            self.failed.append(child.run)
        outcome = "finished" if done else "stopped" if self.interruption.count else "failed"
        self.progress.ended(child.run, outcome, time.monotonic() - child.started)

    def _pass_on_interruption(self) -> None:
        """A run takes the first Ctrl-C as a wish for a checkpoint, a later one as an order to stop at once."""
        if self.interruption.count > self.passed_on:
            if self.passed_on == 0:
                self.progress.say("stopping: the runs finish their step and save a checkpoint")
            self.passed_on = self.interruption.count
            for child in self.children:
                if child.process.poll() is None:
                    os.killpg(child.process.pid, signal.SIGINT)


def command(run: SweepRun, resume: bool) -> list[str]:
    """The command line of a run, from the copy of its recipe."""
    words = [sys.executable, "-m", "rlbal.cli", "train", str(run.recipe_file)]
    if run.recipe.launch.num_processes > 1:
        assert run.recipe.launch.accelerate is not None  # checked by `resolve_runs`
        words += ["--accelerate", run.recipe.launch.accelerate]
        words += ["--num-processes", str(run.recipe.launch.num_processes)]
    if resume:
        return [*words, "--resume"]
    return [*words, "--overwrite"] if run.directory.is_run else words


def environment(sweep: Sweep, run: SweepRun, slot: int) -> dict[str, str]:
    """A run's environment: its share of the cores, unless OMP_NUM_THREADS is set, and its own GPUs, if any are named.

    Args:
        slot: number of the run among those at once.
    """
    processes = run.recipe.launch.num_processes
    threads = max(1, len(os.sched_getaffinity(0)) // (sweep.parallel * processes))
    values = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    if sweep.gpus is not None:
        share = len(sweep.gpus) // sweep.parallel
        devices = sweep.gpus[slot * share : slot * share + processes]
        values["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    return values


def _failures(failed: list[SweepRun], total: int) -> str:
    """The failed runs, each with the end of its log."""
    lines = [f"{len(failed)} of {total} runs failed:"]
    for run in failed:
        text = run.log.read_text(encoding="utf-8", errors="replace")
        last = [line for line in printable(text[-4000:], 4000).splitlines() if line.strip()][-LOG_LINES:]
        lines += [f"{run.label} ({run.log}):", *(f"    {line}" for line in last or ["(no output)"])]
    return "\n".join(lines)


def _compare(paths: list[Path], console: Console) -> None:
    """Print the comparison; a sweep whose runs cannot be compared is a sweep all the same."""
    from rlbal.experiments.compare import compare_runs
    from rlbal.experiments.compare_view import show

    if not paths:
        return
    try:
        show(compare_runs(paths), console)
    except RlbalError as error:
        console.print(f"no comparison: {error}", markup=False)
