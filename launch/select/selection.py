"""One call of `shardgan select`: check everything first, then train, submit or only collect."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import click

from launch.select import local, plots, queue, start, table, verdict
from launch.select.choice import ScoreTable
from launch.select.local import Say
from launch.select.search import Search
from launch.select.trials import LaunchOptions, Trial
from launch.slurm.jobs import Resources
from pipeline.config import Config, UserError
from pipeline.run.page.document import PAGE, write_beside
from pipeline.run.stop import INTERRUPTED
from pipeline.wording import counted, in_kimg


@dataclass
class Selection:
    """Its trials, and how those that failed have failed."""

    base: Config
    trials: Sequence[Trial]
    launch: LaunchOptions
    given: tuple[str, tuple[str, ...]]  # config and settings, as on the command line
    say: Say
    rule: str
    search: Search | None = None
    failures: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    ended: int = 0  # of which it has been said, or was known at the start

    @property
    def folder(self) -> Path:
        return Path(self.base.run.out) / str(self.base.run.name)

    @property
    def todo(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.done]

    @property
    def _total(self) -> int:
        """Trials, those included that a search is still to propose."""
        return len(self.trials) + (sum(self.search.batches) * self._places if self.search else 0)

    @property
    def _places(self) -> int:
        """Trials of each candidate."""
        return len({trial.place for trial in self.trials})

    def train(self, jobs: int) -> None:
        """Train on this machine what is not done; then write the table and the choice."""
        self._check(jobs)
        with local.hold(self.folder, self.trials, self.say) as lock:
            self._begin()

            def ended(trial: Trial, problem: str) -> None:
                lock.check()
                self._ended(trial, problem)

            # Another select may have finished some while this one waited for the folder.
            signals = local.train(self.todo, self.launch, jobs, self.folder, self.say, ended)
            while signals.received is None and (more := self._propose()):
                signals = local.train(more, self.launch, jobs, self.folder, self.say, ended)
            lock.check()
            found = self._conclude()
        if signals.received is not None:
            self.say(f"Stopped {signals.received}; the same command continues.")
            if signals.interrupted:
                raise SystemExit(INTERRUPTED)
        elif found.minimum is None:
            raise click.ClickException(_nothing(found, self.folder / "logs"))

    def submit(self, resources: Resources, jobs: int, named: Mapping[str, str]) -> None:
        """Submit to Slurm what is not done. named: see queue.submit."""
        if not self.todo and not (self.search and self.search.batches):
            self.train(jobs)
            return
        self._check(None)
        with local.hold(self.folder, self.trials, self.say):
            self._begin()
            self._propose()
            if not self.todo:  # there are no more candidates, or another select has trained them
                self._conclude()
                return
            later = [size * self._places for size in self.search.batches] if self.search else []
            queue.submit(self.todo, self.launch, resources, jobs, self.folder, self.say, named, later)

    def collect(self) -> None:
        """Train nothing. Failures are known from the last call's table and from the logs of jobs."""
        if not self.folder.is_dir():
            raise UserError(f"There is nothing to collect: no selection has begun in {self.folder}.")
        now = self._common()
        self._refuse_unknown()
        self._check_same({"candidates": now["candidates"]})  # however they are trained
        with local.hold(self.folder, (), self.say):
            waiting = {trial.name for trial in self.todo}
            failed = table.failures(self.folder) | queue.failures(self.trials, self.folder)
            self.failures |= {name: problem for name, problem in failed.items() if name in waiting}
            if self.search and queue.is_collecting(self.folder):
                ended = queue.listed_before(self.folder)  # undone without an error: cancelled, say
                self._propose(ended)
                over = ended | self.failures.keys()
                queue.write_next([t for t in self.todo if t.name not in over], self.folder)
            found = self._conclude()
        if found.minimum is None and not any(row.pending for row in found.rows):
            raise click.ClickException(_nothing(found, self.folder))

    def _refuse_unknown(self) -> None:
        """A mistyped candidate would withdraw what was chosen among the true ones. (Those of a search are
        written down.)"""
        known = table.listed(self.folder)
        strange = [t.name for t in self.trials if t.name not in known and not t.folder.exists()]
        if known and strange and not self.search:
            raise UserError(
                f"--collect trains nothing, and {self.folder} has no {strange[0]}. Give the candidates, "
                "--folds, --seeds and run.seed as before."
            )

    def _common(self) -> dict[str, object]:
        return start.common(self.trials, self.launch, self.search.axes if self.search else None)

    def _propose(self, ended: Set[str] = frozenset()) -> list[Trial]:
        """The trials of the next candidates of a search, once those so far are done, have failed or are among
        the `ended`."""
        over = ended | self.failures.keys()
        if self.search is None or any(trial.name not in over for trial in self.todo):
            return []
        more = self.search.propose(self._table().rows)
        if not more:
            return []
        self.say(f"Proposed: {'; '.join(arm.name for arm in more)}")
        new = self.search.trials_of(more)
        self.trials = [*self.trials, *new]
        return new

    def _check_same(self, now: dict[str, object]) -> None:
        """Raises UserError if finished trials would not compare with new ones."""
        start.check_common(self.folder, now)
        table.check_scored(self.base, self.trials)
        self._table()
        arms = {trial.arm for trial in self.trials}
        if self.search and self.search.count > len(arms):
            self.say(f"A search for {counted(self.search.count, 'candidate')}, {len(arms)} of them proposed:")
        self.say(
            f"{self.base.run.name}: {counted(len(arms), 'candidate')} x {self._places} folds and seeds = "
            f"{counted(len(self.trials), 'trial')} of {in_kimg(self.base.run.total_kimg)} kimg, "
            f"{len(self.trials) - len(self.todo)} of them done"
        )

    def _check(self, jobs: int | None) -> None:
        """Everything that can be known before anything starts; jobs: None where other machines train."""
        self._check_same(self._common())
        self._refuse_queued()
        start.check(self.base, self.trials, self.launch, jobs)

    def _refuse_queued(self) -> None:
        if self.todo or (self.search and self.search.batches):  # arrays of a search may still be to come
            queue.refuse_queued(self.folder)

    def _begin(self) -> None:
        """Write what later calls must agree with, and a table without failures: these trials are retried."""
        self._refuse_queued()  # again: another call may have submitted them while this one checked or waited
        start.write_common(self.folder, self._common())
        if self.search:
            self.trials = self.search.read()  # what another select has proposed while this one waited
            self.search.write()
        table.write(self.folder, self._table(), self.base, self.trials)
        self.ended = len(self.trials) - len(self.todo)

    def _table(self) -> ScoreTable:
        return table.read_table(self.base, self.trials, self.failures, self.rule)

    def _ended(self, trial: Trial, problem: str) -> None:
        """Record what went wrong with a trial that has ended, update the table and report."""
        if problem:
            self.failures[trial.name] = problem
        now = self._table()
        try:
            table.write(self.folder, now, self.base, self.trials)
        except UserError as error:  # it is written again at the end
            self.say(f"warning: {error}")
        failed = {name: problem for row in now.rows for name, problem in row.failures.items()}
        done = [o for row in now.rows for o in row.outcomes]
        scores = [f"{now.score} {o.score:.4f}" for o in done if o.trial == trial]
        what = failed.get(trial.name) or ", ".join(scores)
        minutes = (time.monotonic() - self.began) / 60
        self.ended += 1
        count = f"[{self.ended}/{self._total}]"
        self.say(f"{count} {trial.name}: {what}  after {minutes:.1f} min")

    def _conclude(self) -> ScoreTable:
        """Write, say and draw what is known so far."""
        found = self._table()
        table.write(self.folder, found, self.base, self.trials)
        written = [self.folder / "table.json"]
        if found.choice is None:
            self._withdraw()
        else:
            written += verdict.write(self.folder, found, self.trials, *self.given)
        self.say(verdict.terminal(found))
        if found.choice is not None:  # last, as pictures take a while
            written += [*plots.draw(self.folder, found), *filter(None, [write_beside(self.folder)])]
            self.say("\n".join(map(str, written)))
        return found

    def _withdraw(self) -> None:
        """Remove what an earlier choice has left, as nothing is chosen now."""
        names = ("best.yaml", "report.md", *plots.PICTURES, PAGE)
        if there := [path for name in names if (path := self.folder / name).exists()]:
            for path in there:
                path.unlink()
            self.say(f"The earlier choice is withdrawn. Removed: {', '.join(path.name for path in there)}")


def _nothing(found: ScoreTable, logs: Path) -> str:
    if any(row.outcomes for row in found.rows):
        return f"There is no trial that all candidates have finished; the logs are in {logs}"
    return f"No trial could be finished; their logs are in {logs}"
