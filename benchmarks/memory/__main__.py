"""Memory of a training step: what is kept for backward, the peak for any batch, and the largest batch that fits."""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import options, records
from benchmarks.memory import command_line, measured, networks, plans, tables
from benchmarks.memory.account import COMPILED, Account, account
from benchmarks.memory.networks import Network
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Setting
from benchmarks.records import Conditions, Record, Subject


class Job(NamedTuple):
    """The command line's part for one network in one dtype."""

    network: Network
    dtype: str
    args: argparse.Namespace
    conditions: Conditions

    @property
    def setting(self) -> Setting:
        """Of the device that was asked for."""
        dtype = options.DTYPES[self.dtype]
        return Setting("train", dtype, self.args.device, self.conditions.threads, level=self.network.level)

    def row(self, provider: str, batch: int, metric: str, value: float, unit: str = "B", name: str = "") -> Record:
        """Of the CSV."""
        shape = records.shape_text(self.network.shape(batch))
        subject = Subject(
            self.network.level, name or self.network.name, provider, "train", shape, self.dtype, "channels_last"
        )
        return subject.record(metric, [value], unit, self.conditions)


def main(argv: Sequence[str] | None = None) -> int:
    args = command_line.parse(argv, options.summary(__doc__))
    torch.backends.cudnn.benchmark = True  # as in all other benchmarks
    deadline = time.monotonic() + args.limit
    conditions = records.current_conditions(args.device, torch.get_num_threads())
    print(f"{conditions.device}, {conditions.threads} threads, commit {conditions.commit or 'unknown'}")
    path = args.output / "memory.csv"
    done = _done(path, conditions) if args.resume else set()
    try:
        chosen = _networks(args)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    jobs = [Job(network, dtype, args, conditions) for network, dtype in itertools.product(chosen, args.dtype)]
    left, longest = [], 0.0
    blocks: dict[str, dict[str, dict[str, Account]]] = {dtype: {} for dtype in args.dtype}
    for job in jobs:
        if (job.network.level, job.network.name, job.dtype) in done:
            continue
        started = time.monotonic()
        if left or started + longest > deadline:
            left.append(f"{job.network.name} {job.dtype}")
            continue
        accounts = _accounts(job)
        if job.network.level == "block":
            blocks[job.dtype][job.network.name] = accounts
        records.update(path, (_model if job.network.level == "model" else _block)(job, accounts))
        longest = max(longest, time.monotonic() - started)
    for dtype in args.dtype:
        if blocks[dtype]:
            tables.block_table(dtype, args.block_batch, blocks[dtype]).show()
        _plans(chosen, dtype)
    if left:
        print(f"Left for the next run (--resume), as --limit is near: {', '.join(left)}")
    print(f"Wrote {path}")
    return 0


def _networks(args: argparse.Namespace) -> list[Network]:
    models = [networks.model(name, args.size) for name in args.model] if "model" in args.level else []
    return [*models, *(networks.BLOCKS if "block" in args.level else ())]


def _done(path: Path, conditions: Conditions) -> set[tuple[str, str, str]]:
    """What the file has of the same commit on the same device."""
    here = (conditions.commit, conditions.device)
    rows = [row for row in records.read(path) if (row.conditions.commit, row.conditions.device) == here]
    return {(row.level, row.name, row.dtype) for row in rows}


def _model(job: Job, accounts: Mapping[str, Account]) -> list[Record]:
    """Everything about one model; prints its table."""
    args = job.args
    rows, peaks = [], {}
    for (provider, found), batch in itertools.product(accounts.items(), args.batch):
        rows.append(job.row(provider, batch, "saved_bytes", found.saved.at(batch)))
        rows.append(job.row(provider, batch, "predicted_peak", found.peak(batch)))
        if _is_measured(job, provider) and (provider != COMPILED or batch == max(args.batch)):
            peak = _peak(job, provider, batch)
            if peak is not None:
                peaks[provider, batch] = peak
                rows.append(job.row(provider, batch, "peak_memory", peak))
    tables.peak_table(job.network, job.dtype, accounts, args.batch, peaks).show()
    for provider, found in accounts.items():
        print(f"{provider}, {tables.shares_text(found, max(args.batch))}")
    if args.fit and (args.chosen or job.network.name in command_line.FITTED):
        for provider, found in accounts.items():
            rows += _fit(job, provider, found)
    return rows


def _peak(job: Job, provider: str, batch: int) -> int | None:
    """Measured; None where it fails, which is said."""
    try:
        return measured.peak_bytes(job.network, provider, batch, job.setting)
    except Exception as error:  # what one provider can not do must not lose what the others did
        message = str(error).partition("\n")[0]
        print(f"{job.network.name}, {provider}, batch {batch}: {type(error).__name__}: {message}")
        return None


def _block(job: Job, accounts: Mapping[str, Account]) -> list[Record]:
    """What a block keeps."""
    batch = job.args.block_batch
    return [job.row(name, batch, "saved_bytes", found.saved.at(batch)) for name, found in accounts.items()]


def _fit(job: Job, provider: str, found: Account) -> list[Record]:
    """The largest batch within `--fit`: predicted and, where steps are run, found."""
    limit = job.args.fit
    name = f"{job.network.name} in {_size_text(limit)}"
    predicted = found.largest_batch(limit)
    print(f"{name}, {job.dtype}, {provider}: batch {predicted} predicted", end="")
    rows = [job.row(provider, 1, "predicted_batch", predicted, "1", name)]
    if _is_measured(job, provider):
        run = functools.partial(measured.fits, job.network, provider, limit, job.setting)
        try:
            bracket = measured.search(predicted, run, command_line.TRIES[provider == COMPILED])
        except Exception as error:
            print(f", {type(error).__name__}: {error}", end="")
        else:
            fails = "and the next does not" if bracket.exact else f"and {bracket.fails} does not"
            print(f", {bracket.fits} fits {fails}", end="")
            rows.append(job.row(provider, 1, "largest_batch", bracket.fits, "1", name))
    print()
    return rows


def _accounts(job: Job) -> dict[str, Account]:
    return {name: account(job.network, name, options.DTYPES[job.dtype]) for name in job.args.provider}


def _is_measured(job: Job, provider: str) -> bool:
    """Whether steps of the provider are run on the device; what takes minutes to compile only where it was chosen."""
    if not job.args.measure:
        return False
    if provider == COMPILED and not (job.args.chosen or job.network.name in command_line.FITTED):
        return False
    if provider == COMPILED and job.args.device.type == "cpu":
        return False
    reason = PROVIDERS[provider].unavailable_reason(job.setting)
    if reason:
        print(f"{provider}: {reason}")
    return reason is None


def _plans(chosen: Sequence[Network], dtype: str) -> None:
    kept = {network.name: plans.kept_tensors(network, options.DTYPES[dtype]) for network in chosen}
    tables.plan_table(dtype, kept).show()


def _size_text(size: int) -> str:
    return f"{size / (1 << 30):.3g} GiB"


if __name__ == "__main__":
    raise SystemExit(main())
