"""What a machine with a GPU can tell, in pieces that fit a machine lent for 15 minutes (docs/gpu.md).

Only the standard library is imported here: a summary comes back even where resfuse cannot be imported.  Nothing is
built or installed; the compiled libraries lie in the tree, and Python and torch are the machine's own.

OUT has state.json (how each command ended), summary.txt and files.tar.gz (everything that the pieces wrote).  They are
renewed after each command, and the same call goes on from them, on the same machine or on another.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESERVE = 25.0
"""Seconds that are kept for the report, the files and the end of processes."""
GRACE = 10.0
"""Seconds that a command has after Ctrl-C before it is killed."""
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
STATE, SUMMARY, ARCHIVE = "state.json", "summary.txt", "files.tar.gz"
LONGEST = 40
"""Lines of the summary."""
FIRST = ("check", "fragments", "eight_warps", "hardware", "first_contact", "models", "reduce_overhead")
"""The pieces of a first run, which has twelve minutes."""
NAMES = (*FIRST, "verify", "peers", "ops", "overhead", "suite", "tune", "sanitize", "memory")
"""All pieces in the order of their worth; `report` ends every call."""


class Command(NamedTuple):
    """`python -m <arguments>`; {work}, {device} and {limit} (seconds) are filled in."""

    name: str
    arguments: tuple[str, ...]
    minutes: float
    """After which it is interrupted."""
    least: float = 0.5
    """Minutes that have to be left for it to be begun."""
    resumes: bool = False
    """True where it leaves out finished work, so that it can be called again after it ran out of time."""
    program: tuple[str, ...] = ()
    """A program that watches Python."""


def words(text: str) -> tuple[str, ...]:
    """The arguments of a command line without quotes."""
    return tuple(text.split())


def pieces(device: str, quick: bool) -> dict[str, list[Command]]:
    """The commands of each piece; `quick` rehearses them with the smallest arguments that run the same code."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    bench = words("--output {work}/results --resume --limit {limit} --device {device}")
    peers = words("--provider eager_channels_last inductor cudnn_aten resfuse")
    few = words("--provider eager_channels_last resfuse resfuse_cuda resfuse_triton")
    if quick:
        bench, peers, few = (*bench, "--quick"), words("--provider eager_channels_last resfuse"), ()
    else:
        peers += words("--rounds 8")

    def model(mode: str, batch: str, providers: Sequence[str], minutes: float) -> Command:
        chosen = words(f"benchmarks.models --mode {mode} --batch {batch}" + (" --dtype float32" if quick else ""))
        return Command(f"resnet50 {mode}, batch {batch}", (*chosen, *providers, *bench), minutes, 1.0, resumes=True)

    def op(name: str) -> Command:
        modes = words(f"benchmarks.{name} --mode inference full --batch {2 if quick else 128}")
        return Command(name, (*modes, *few, *bench), 2.5, 0.7, resumes=True)

    hardware = "tests/backends/test_cuda_hardware.py" if device == "cuda" else "tests/ops/test_contract.py"
    apart = {"fragments": "products", "eight_warps": "eight_warps", "reduce_overhead": "reduce_overhead"}

    def some(piece: str, minutes: float) -> list[Command]:
        """The hardware tests that are a piece of their own; a rehearsal has none of them."""
        return [tests(piece, [hardware, "-k", apart[piece]], minutes)] if device == "cuda" else []

    return {
        "check": [
            Command("libraries", ("resfuse._extension",), 1),
            Command("info", words("resfuse info"), 1),
        ],
        "fragments": some("fragments", 1),
        "eight_warps": some("eight_warps", 1.5),
        "hardware": [tests("hardware", [hardware, "-k", f"not ({' or '.join(apart.values())})"], 2.5)],
        "first_contact": [
            # One op: what is wanted is the check of all kernels that comes before.
            Command("first contact", words("resfuse verify --op add_relu " + (
                "--backend reference --dtype float32" if device == "cpu" else
                "--backend cuda --backend sm90 --backend triton --dtype bfloat16")), 2),
        ],
        "models": [
            *(model("inference", batch, peers, 2) for batch in (["2"] if quick else ["1", "32", "128"])),
            model("train", "2" if quick else "256", [word for word in peers if word != "cudnn_aten"], 3),
        ],
        "reduce_overhead": some("reduce_overhead", 1.5),
        "verify": [] if device == "cpu" else [
            Command("verify cuda", words("resfuse verify --backend cuda"), 2),
            Command("verify sm90", words("resfuse verify --backend sm90 --dtype bfloat16 --dtype float32"), 1),
            # Kernels of other dtypes would be compiled for minutes.
            Command("verify triton", words("resfuse verify --backend triton --dtype bfloat16"), 2, 1.0),
        ],
        "peers": [] if quick else [
            model("inference", "128", words("--provider eager_channels_last inductor_max_autotune tensorrt"), 4),
        ],
        "ops": [op(name) for name in (["add_relu"] if quick else ["conv_bn_act", "bn_act", "add_relu"])],
        "overhead": [
            Command("overhead", words("benchmarks.overhead --output {work}/results --device {device}")
                    + (("--quick",) if quick else ()), 1.5),
        ],
        "suite": [tests("suite", [hardware] if quick else ["tests/ops", "tests/backends"], 6)],
        "tune": [
            Command(kind, words(f"resfuse tune --model cifar_resnet --kind {kind} --batch 2 --dry-run" if quick else
                                f"resfuse tune --model resnet50 --kind {kind} --batch {batch} --candidates 6"
                                " --output {work}/tables"), 4, 1.5, resumes=True)
            for kind, batch in (("forward", 128), ("train", 256))
        ],
        "sanitize": [
            Command(f"{tool} {backend}", ("tests.emulator.cases", backend, "bfloat16"), 2, 1.0,
                    program=(sanitizer, "--tool", tool, "--error-exitcode", "99"))
            for backend in ("cuda", "triton") for tool in SANITIZERS
        ] if device == "cuda" else [],
        "memory": [
            Command("memory", words(
                "benchmarks.memory --model cifar_resnet20 --batch 2 --provider eager_channels_last"
                if quick else "benchmarks.memory --model resnet50 --batch 64 256")
                + words("--peak --output {work}/results --device {device}"), 4, 1.0),
        ],
        "report": [Command("report", words("benchmarks.report {work}/results"), 1, 0.0)],
    }  # fmt: skip


def tests(name: str, paths: Sequence[str], minutes: float) -> Command:
    """pytest over paths, by several processes and with a limit per test where the machine has the plugins."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(max(1, min(14, len(os.sched_getaffinity(0)) - 2))), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "90"]
    return Command(name, ("pytest", *options, *paths), minutes, 1.0)


def sources() -> str:
    """Hash of what the tests are about."""
    digest = hashlib.sha256()
    for folder in ("resfuse", "csrc", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".inl", ".cu", ".cuh", ".so"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Run:
    """The pieces on this machine."""

    def __init__(self, output: Path, work: Path, device: str, quick: bool, limit: float) -> None:
        self.output, self.work = output.resolve(), work.resolve()
        self.device, self.limit, self.end = device, limit, time.monotonic() + limit
        self.pieces = pieces(device, quick)
        self.output.mkdir(parents=True, exist_ok=True)
        state = self.output / STATE
        self.state: dict[str, Any] = json.loads(state.read_text()) if state.is_file() else {}
        if not self.work.is_dir():
            self.work.mkdir(parents=True)
            if (archive := self.output / ARCHIVE).is_file():
                with tarfile.open(archive) as packed:
                    packed.extractall(self.work, filter="data")
        digest = sources()
        if self.state.pop("sources", digest) != digest:
            print("The sources have changed since: what was tested is tested again")
            for name in sorted({*NAMES} - {"models", "peers", "ops", "overhead", "tune", "memory"}):
                self.state.pop(name, None)
        self._sources = digest

    def do(self, names: Sequence[str], again: bool) -> None:
        """Run the commands of pieces that have not ended yet, as far as there is time; then the report."""
        for name in names:
            for command in self.pieces[name]:
                known = self.state.get(name, {}).get(command.name, {})
                if known.get("status") in ("done", "failed") and not again:
                    continue
                left = self.end - time.monotonic() - RESERVE
                if left < min(60 * command.least, 0.8 * self.limit):
                    continue  # another one may be shorter
                self._run(name, command, min(60 * command.minutes, left))
        for command in self.pieces["report"] if any((self.work / "results").glob("*.csv")) else []:
            self._run("report", command, max(5.0, self.end - time.monotonic() - GRACE))
        self.save()

    def _run(self, piece: str, command: Command, limit: float) -> None:
        filled = {"work": str(self.work), "device": self.device, "limit": f"{max(5.0, limit - GRACE):.0f}"}
        line = [*command.program, sys.executable, "-m", *(word.format(**filled) for word in command.arguments)]
        print(f"{piece}: {command.name} (at most {limit / 60:.1f} minutes)", flush=True)
        log = self.work / "logs" / f"{piece}-{command.name}.log".replace(" ", "-").replace(",", "")
        log.parent.mkdir(exist_ok=True)
        (self.work / "tables").mkdir(exist_ok=True)
        begun = time.monotonic()
        status = self._wait(line, log, limit, bool(command.program))
        seconds = round(time.monotonic() - begun, 1)
        tail = log.read_text(errors="replace")[-4000:] if log.is_file() else ""
        unfinished = (status is None and command.resumes) or "The time is up" in tail
        found = "unfinished" if unfinished else "done" if status == 0 else "failed"
        entry = {"status": found, "exit": status, "seconds": seconds, "tail": tail}
        self.state.setdefault(piece, {})[command.name] = entry
        self.save()

    def _wait(self, line: Sequence[str], log: Path, limit: float, watched: bool) -> int | None:
        """The exit status of a command, None where its time was over; what it started ends with it."""
        environment = {
            **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "COLUMNS": "120", "EMU_OFF": "1",
            "XDG_CACHE_HOME": str(self.work / "cache"),  # verdicts of the first contact go into the archive
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        if watched:  # an allocation of its own per tensor: what lies beyond one then belongs to nobody
            environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    line, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                output.write(str(error).encode())
                return 127
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return None
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
        return process.returncode

    def save(self) -> None:
        """Write state, summary, and the archive of everything that the pieces wrote."""
        (self.output / STATE).write_text(json.dumps({"sources": self._sources, **self.state}, indent=1) + "\n")
        (self.output / SUMMARY).write_text("\n".join(self.summary()) + "\n")
        partial = self.output / f"{ARCHIVE}.tmp"
        with tarfile.open(partial, "w:gz") as packed:
            packed.add(self.work, ".")
        partial.replace(self.output / ARCHIVE)

    def summary(self) -> list[str]:
        """At most 40 lines: how each piece ended, the tests that failed, the last lines of what else failed."""
        found = []
        for piece, commands in self.pieces.items():
            known = self.state.get(piece, {})
            states = [known.get(command.name, {}).get("status", "left") for command in commands]
            seconds = sum(entry["seconds"] for entry in known.values())
            found.append(f"{piece:<9} {', '.join(dict.fromkeys(states)) or 'nothing to do'} ({seconds:.0f} s)")
            for command in commands:
                entry = known.get(command.name, {"status": "left"})
                lines = [line.strip() for line in entry.get("tail", "").splitlines() if line.strip()]
                if entry["status"] == "failed":
                    how = "its time was over" if entry["exit"] is None else f"exit status {entry['exit']}"
                    found.append(f"  {command.name}: {how}: {' | '.join(lines[-2:])}"[:240])
                elif command.arguments[0] == "pytest":
                    found += [f"  {line}" for line in lines[-1:]]
                found += [f"  {line}"[:200] for line in lines if line.startswith(("FAILED ", "ERROR "))][:10]
        if len(found) > LONGEST:
            found = [*found[: LONGEST - 1], f"... {len(found) - LONGEST + 1} more lines: see {STATE}"]
        return found


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # it leads a session of its own


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, also where time was too short for all; 1 where a command failed."""
    parser = argparse.ArgumentParser(prog="python3 -m tools.gpu_run", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("out/gpu"), metavar="OUT", help="what is kept (default %(default)s)")
    add("--work", type=Path, default=Path("build/gpu"), metavar="DIR", help="where pieces write (default %(default)s)")
    piece = f"of {', '.join(NAMES)} (default: {' '.join(FIRST)})"
    add("--piece", nargs="+", choices=NAMES, default=FIRST, metavar="NAME", help=piece)
    add("--limit", type=float, default=720.0, metavar="SECONDS", help="for this call (default %(default)g)")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default %(default)s; cpu rehearses")
    add("--quick", action="store_true", help="the smallest arguments that run the same code: a rehearsal")
    add("--again", action="store_true", help="repeat what has ended")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.quick:
        parser.error("argument --device: cpu is for rehearsals, with --quick")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it to be ignored
    run = Run(args.output, args.work, args.device, args.quick, args.limit)
    try:
        run.do(args.piece, args.again)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
    run.save()
    print("\n".join(run.summary()))
    return int(any(entry["status"] == "failed" for piece in args.piece for entry in run.state.get(piece, {}).values()))


if __name__ == "__main__":
    raise SystemExit(main())
