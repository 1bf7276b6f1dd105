"""What one call of `shardgan select` does: look at everything first, then train, submit or only collect."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from launch.select import plots as select_plots
from launch.select import queue as select_queue
from launch.select import report as select_report
from launch.select import run as select_run
from launch.select import start as select_start
from launch.select import table as select_table
from launch.select.choice import ScoreTable
from launch.select.run import Say
from launch.select.trials import LaunchOptions, Trial
from launch.slurm.jobs import Resources
from pipeline.config import Config, UserError
from pipeline.run.stop import INTERRUPTED
from pipeline.wording import counted


@dataclass
class Work:
    """A selection, and what is known of its trials that failed."""

    base: Config
    trials: Sequence[Trial]
    launch: LaunchOptions
    given: tuple[str, tuple[str, ...]]  # config and settings, as on the command line
    say: Say
    rule: str
    failures: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.base.run.out) / str(self.base.run.name)

    @property
    def todo(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.done]

    def train(self, jobs: int) -> None:
        """On this machine, whatever is not done; then the table and the choice."""
        self._look(jobs)
        with select_run.hold(self.folder, self.trials, self.say) as lock:
            self._note()
            todo = self.todo  # another select may have been at work until now

            def ended(trial: Trial, problem: str) -> None:
                lock.check()
                self._ended(trial, problem)

            signals = select_run.run(todo, self.launch, jobs, self.folder, self.say, ended)
            lock.check()
            found = self._conclude()
        if signals.received is not None:
            self.say(f"Stopped {signals.received}; the same command continues.")
            if signals.interrupted:
                raise SystemExit(INTERRUPTED)
        elif found.minimum is None:
            raise click.ClickException(_nothing(found, self.folder / "logs"))

    def submit(self, resources: Resources, jobs: int) -> None:
        """To Slurm, whatever is not done."""
        if not self.todo:
            self.train(jobs)
            return
        self._look(None)
        with select_run.hold(self.folder, self.trials, self.say):
            self._note()
            select_queue.submit(self.todo, self.launch, resources, jobs, self.folder, self.say)

    def collect(self) -> None:
        """Train nothing. What has failed is known by what the last call noted, and by the logs of jobs."""
        now = select_start.common(self.trials, self.launch)
        self._refuse({"candidates": now["candidates"]})  # however they are trained
        with select_run.hold(self.folder, (), self.say):
            waiting = {trial.name for trial in self.todo}
            noted = select_table.failures(self.folder) | select_queue.failures(self.trials, self.folder)
            self.failures |= {name: problem for name, problem in noted.items() if name in waiting}
            found = self._conclude()
        if found.minimum is None and not any(row.pending for row in found.rows):
            raise click.ClickException(_nothing(found, self.folder))

    def _refuse(self, now: dict[str, object]) -> None:
        """What does not stand beside what there is. Raises UserError."""
        select_start.check_common(self.folder, now)
        select_table.check_scored(self.base, self.trials)
        self._table()
        arms, places = ({getattr(t, of) for t in self.trials} for of in ("arm", "place"))
        self.say(
            f"{self.base.run.name}: {counted(len(arms), 'candidate')} x {len(places)} folds and seeds = "
            f"{counted(len(self.trials), 'trial')} of {self.base.run.total_kimg:g} kimg, "
            f"{len(self.trials) - len(self.todo)} of them done"
        )

    def _look(self, jobs: int | None) -> None:
        """Everything that can be known before anything starts; jobs: None where other machines train."""
        self._refuse(select_start.common(self.trials, self.launch))
        if self.todo:
            select_queue.refuse_queued(self.folder)
        select_start.check(self.base, self.trials, self.launch, jobs)

    def _note(self) -> None:
        """Leave what later calls are held to, and take back that trials failed that are now tried again."""
        select_start.note_common(self.folder, select_start.common(self.trials, self.launch))
        select_table.write(self.folder, self._table(), self.base, self.trials)

    def _table(self) -> ScoreTable:
        return select_table.table(self.base, self.trials, self.failures, self.rule)

    def _ended(self, trial: Trial, problem: str) -> None:
        """Note what went wrong with a trial that has ended, bring the table up to date, say so."""
        if problem:
            self.failures[trial.name] = problem
        now = self._table()
        try:
            select_table.write(self.folder, now, self.base, self.trials)
        except UserError as error:  # it is written again at the end
            self.say(f"warning: {error}")
        problem = next((row.failures[trial.name] for row in now.rows if trial.name in row.failures), "")
        done = [o for row in now.rows for o in row.outcomes]
        scores = [f"{now.score} {o.score:.4f}" for o in done if o.trial == trial]
        ended = len(done) + sum(len(row.failures) for row in now.rows)
        minutes = (time.monotonic() - self.began) / 60
        what = problem or ", ".join(scores)
        self.say(f"[{ended}/{len(self.trials)}] {trial.name}: {what}  after {minutes:.1f} min")

    def _conclude(self) -> ScoreTable:
        """Write, say and draw what is known by now."""
        found = self._table()
        select_table.write(self.folder, found, self.base, self.trials)
        written = [self.folder / "table.json"]
        if found.choice is None:
            (self.folder / "best.yaml").unlink(missing_ok=True)  # of a choice that no longer stands
        else:
            written += select_report.write(self.folder, found, self.trials, *self.given)
        self.say(select_report.terminal(found))
        if found.choice is not None:  # last, as pictures take a while
            written += select_plots.draw(self.folder, found)
            self.say("\n".join(map(str, written)))
        return found


def _nothing(found: ScoreTable, logs: Path) -> str:
    if any(row.outcomes for row in found.rows):
        return f"There is no trial that all candidates have finished; the logs are in {logs}"
    return f"No trial could be finished; their logs are in {logs}"
