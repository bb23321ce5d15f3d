"""The command line: `resfuse info | verify | explain | tune`, or `python -m resfuse`.

Each command is a module with `add_arguments(parser)` and `run(args) -> int`.  Only the requested one is imported, so a
package that another command needs may be missing or broken.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import resfuse

COMMANDS = {
    "info": "Show versions, devices, backends and build settings, for bug reports.",
    "verify": "Check the numerical contract of every backend on this machine.",
    "explain": "Explain which backend runs each layer of a network, its roofline cost, and where time is lost.",
    "tune": "Measure every backend's convolutions on this machine's GPU, which then runs the fastest.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process if None.

    Returns:
        The exit code: 0; 1 if `verify` found a violation or a command cannot run here; 2 if `tune` cannot.

    Raises:
        SystemExit: code 2 for invalid arguments, code 0 for --help and --version.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    requested = next((argument for argument in arguments if argument in COMMANDS), None)
    module = None if requested is None else importlib.import_module(f"resfuse.cli.{requested}")
    parser = argparse.ArgumentParser(prog="resfuse", description=resfuse.__doc__)
    parser.add_argument("--version", action="version", version=resfuse.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == requested and module is not None:
            module.add_arguments(command)
    args = parser.parse_args(arguments)
    assert module is not None  # the parser has rejected everything else
    return int(module.run(args))
