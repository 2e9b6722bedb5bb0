"""How a sweep is getting on: bars on a terminal, a line per run elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlbal.experiments.results import last_step
from rlbal.experiments.sweep import SweepRun

SECONDS_BETWEEN_LOOKS = 1.0
SPEED_PERIOD = 3600.0  # runs stand still while they load, so the time left is from a long stretch


class SweepProgress:
    """A bar over all runs and one for each run at work.

    Args:
        console: where it shows.
        total: runs of the sweep.
        done: runs that were finished before.
    """

    def __init__(self, console: Console, total: int, done: int) -> None:
        self.console, self.total, self.done = console, total, done
        self.looked = 0.0
        self.tasks: dict[str, TaskID] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=SPEED_PERIOD,
            disable=not console.is_terminal,
        )
        self.overall = self.progress.add_task("[bold]sweep", total=total, completed=done, count=self._count())

    def _count(self) -> str:
        return f"{self.done}/{self.total} runs"

    def __enter__(self) -> "SweepProgress":
        if self.done:
            self.say(f"{self.done} of {self.total} runs are finished already")
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False)

    def started(self, run: SweepRun, how: str) -> None:
        """A run was started; `how` says whether afresh or from a checkpoint."""
        self.tasks[run.label] = self.progress.add_task(run.label, total=run.steps, count="loading")
        if not self.console.is_terminal:
            self.say(f"{run.label}: {how}")

    def ended(self, run: SweepRun, outcome: str, seconds: float) -> None:
        """A run is over: finished, failed or stopped."""
        self.progress.remove_task(self.tasks.pop(run.label))
        self.done += outcome == "finished"
        self.say(f"{run.label}: {outcome} after {seconds:.0f} s  ({self._count()} finished)")

    def update(self, running: list[SweepRun]) -> None:
        """Show the steps of the runs at work."""
        if not self.console.is_terminal or time.monotonic() - self.looked < SECONDS_BETWEEN_LOOKS:
            return
        self.looked = time.monotonic()
        share = 0.0
        for run in running:
            step = last_step(run.directory)
            count = f"step {step}/{run.steps or '?'}" if step else "loading"
            self.progress.update(self.tasks[run.label], completed=step, count=count)
            share += step / run.steps if run.steps else 0.0
        self.progress.update(self.overall, completed=self.done + share, count=self._count())
