"""One case in all its settings: providers are prepared and checked, and then take turns."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import outcome, records, workload
from benchmarks.cases import Case
from benchmarks.crew import Crew, OutOfTimeError, Plan
from benchmarks.measure import Sample
from benchmarks.providers import Setting
from benchmarks.records import Conditions, Record, Roofline
from benchmarks.runner import Findings
from benchmarks.terminal import Progress, Terminal
from benchmarks.worker import LateError, NothingToOfferError, ProviderError, Worker
from benchmarks.workload import Workload

MOST_CALLS = 200
"""In a turn: enough for a median, however short they are."""


class Contestant(NamedTuple):
    """A provider at work in one setting."""

    provider: str
    workload: Workload
    worker: Worker
    errors: dict[str, float]


class Contest:
    """A case, the providers that take part in it, and how they are measured."""

    def __init__(
        self,
        case: Case,
        entries: Sequence[tuple[str, Setting]],
        plan: Plan,
        terminal: Terminal,
        last_chance: bool = True,
    ) -> None:
        """What is to be done.

        Args:
            case: what is run.
            entries: the providers, each in a setting of the case's level and mode.
            plan: how long and how often.
            terminal: where failures are said.
            last_chance: another run would not have more time, so that a provider for which there is none is left out.
        """
        self._case, self._entries, self._plan, self._terminal = case, list(entries), plan, terminal
        self._last_chance = last_chance
        self._left_out: dict[tuple[str, Setting], bool] = {}

    @property
    def failed(self) -> bool:
        """Whether a provider failed, or was wrong; one that has nothing to offer for the case did neither."""
        return any(self._left_out.values())

    def hold(self, crew: Crew, costs: Callable[[Setting], Roofline | None], conditions: Conditions) -> list[Record]:
        """The rows of the case.

        Raises:
            OutOfTimeError: the deadline has come before all had their turns.
        """
        rows: list[Record] = []
        with ExitStack() as stack, self._terminal.progress() as progress:
            stack.callback(crew.rest)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            try:
                contestants = list(self._prepared(crew, folder, progress))
            except MemoryError as error:  # of what results are compared with: without it nobody has a speed
                self._terminal.say(f"{self._case.name} is left out: {error}", "failure")
                self._left_out |= dict.fromkeys(self._entries, True)
                contestants = []
            for contestant, samples, found in self._take_turns(contestants, crew, progress):
                setting = contestant.workload.setting
                subject = outcome.subject(self._case, contestant.provider, setting)
                rows += outcome.rows(subject, setting, contestant.errors, samples, found, costs(setting), conditions)
        for (provider, setting), failed in self._left_out.items():
            subject = outcome.subject(self._case, provider, setting)
            rows.append(subject.record(outcome.metric(outcome.LEFT_OUT, setting), [int(failed)], "1", conditions))
        return rows

    def _prepared(self, crew: Crew, folder: Path, progress: Progress) -> Iterator[Contestant]:
        """Those whose results are right; says why the others are left out."""
        made: dict[Setting, Workload] = {}
        files: dict[Setting, Path] = {}
        progress.begin(f"{self._case.name}: preparing", len(self._entries))
        prepared = 0
        for provider, setting in self._entries:  # which may become more
            self._plan.check_time()
            common = dataclasses.replace(setting, graph=False)
            if common not in made:
                made[common] = workload.make_workload(self._case, common)
            job = dataclasses.replace(made[common], setting=setting)
            if setting not in files:
                files[setting] = folder / f"{len(files)}.pt"
                job.save(files[setting])
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
            patience = self._plan.time_to_prepare(prepared)
            try:
                if patience <= 0:
                    raise LateError("no time was left for it")
                contestant = self._check(provider, job, files[setting], crew, patience)
            except ProviderError as error:
                late = isinstance(error, LateError) and patience < self._plan.patience
                if late and not self._last_chance:
                    raise OutOfTimeError from error
                self._leave_out(provider, setting, crew, error)
                if setting.graph and setting.level != "model" and not isinstance(error, NothingToOfferError):
                    self._entries.append((provider, common))
            else:
                prepared += 1
                yield contestant
            progress.advance()

    def _check(self, provider: str, job: Workload, path: Path, crew: Crew, patience: float) -> Contestant:
        """Prepare a provider and look at what it computes.

        Raises:
            ProviderError: it failed, or its results are wrong: then it has no speed.
        """
        worker = crew.worker(provider, job.setting)
        errors = worker.prepare(path, None if math.isinf(patience) else patience)
        for quantity, error in errors.items():
            if not error <= job.limit(quantity):
                raise ProviderError(
                    f"wrong: {workload.describe_errors(errors)}; limit {job.limit(quantity):.1e} for the {quantity}, "
                    f"eager {workload.describe_errors(job.eager_errors)}"
                )
        return Contestant(provider, job, worker, errors)

    def _leave_out(self, provider: str, setting: Setting, crew: Crew, error: ProviderError) -> None:
        unsuitable = isinstance(error, NothingToOfferError)
        if not unsuitable:
            crew.dismiss(provider, setting)
        self._left_out[provider, setting] = not unsuitable
        graph = ", as a CUDA graph" if setting.graph else ""
        self._terminal.say(
            f"{provider}, {records.dtype_text(setting.dtype)}{graph}, is left out:", "note" if unsuitable else "failure"
        )
        self._terminal.say(str(error).rstrip(), "detail")

    def _take_turns(
        self, contestants: list[Contestant], crew: Crew, progress: Progress
    ) -> Iterator[tuple[Contestant, list[Sample], Findings]]:
        """Warm up, then A B C A B C ..."""

        def each(what: str, turn: Callable[[Contestant], object], rounds: int = 1) -> None:
            progress.begin(f"{self._case.name}: {what}", rounds * len(contestants))
            for _ in range(rounds):
                for contestant in list(contestants):
                    try:
                        turn(contestant)
                    except ProviderError as error:
                        contestants.remove(contestant)
                        self._leave_out(contestant.provider, contestant.workload.setting, crew, error)
                    progress.advance()
                    self._plan.check_time()

        calls: dict[int, int] = {}
        samples: dict[int, list[Sample]] = {id(contestant): [] for contestant in contestants}
        findings: dict[int, Findings] = {}

        def warm_up(contestant: Contestant) -> None:
            seconds = contestant.worker.warm_up(self._plan.warmup)
            calls[id(contestant)] = max(1, min(MOST_CALLS, math.ceil(self._plan.turn / seconds)))

        def run(contestant: Contestant) -> None:
            # Another process ran before: the first call brings caches, memory and threads back.
            count = calls[id(contestant)]
            lead_in = count > 1 or contestant.workload.setting.device.type == "cuda"
            samples[id(contestant)] += contestant.worker.run(count, lead_in)

        def finish(contestant: Contestant) -> None:
            findings[id(contestant)] = contestant.worker.finish()

        each("warming up", warm_up)
        each("measuring", run, self._plan.rounds)
        each("looking back", finish)
        for contestant in contestants:
            yield contestant, samples[id(contestant)], findings[id(contestant)]
