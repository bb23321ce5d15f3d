"""The command line: `resfuse info | verify | demo | bench | explain | tune`, or `python -m resfuse`.

Each command is a module with `add_arguments(parser)` and `run(args) -> int`, imported when it is the one that is asked
for: what another one needs may be missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import resfuse

COMMANDS = {
    "info": "Show what resfuse found on this machine, for bug reports.",
    "verify": "Hold every backend against float64: the numerical contract, on this machine.",
    "demo": "Train a small ResNet and run ResNet-50, eager and fused, and compare.",
    "bench": "Measure resfuse against its peers, or make a report of what was measured.",
    "explain": "Explain what runs where in a network, what it costs at least, and where time is lost.",
    "tune": "Measure the configurations of the Triton kernels on this machine's GPU.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, those of the process if None.

    Returns:
        The exit code: 0; 1 where `verify` found a violation or a command can not run here; 2 where `tune` can not.

    Raises:
        SystemExit: with code 2 for arguments that do not fit, with code 0 for --help and --version.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    asked = next((argument for argument in arguments if argument in COMMANDS), None)
    module = None if asked is None else importlib.import_module(f"resfuse.cli.{asked}")
    parser = argparse.ArgumentParser(prog="resfuse", description=resfuse.__doc__)
    parser.add_argument("--version", action="version", version=resfuse.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == asked and module is not None:
            command.description = (module.__doc__ or summary).partition("\n")[0]
            module.add_arguments(command)
    args = parser.parse_args(arguments)
    assert module is not None  # or the parser has refused the arguments
    return int(module.run(args))
