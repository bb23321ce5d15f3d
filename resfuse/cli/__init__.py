"""The command line: `resfuse info | verify | demo | tune`, or `python -m resfuse`.

Each command is a module with `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import resfuse
from resfuse.cli import demo, info, tune, verify

COMMANDS = {"info": info, "verify": verify, "demo": demo, "tune": tune}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments, those of the process if None.

    Returns:
        The exit code: 0; 1 where `verify` found a violation or a command can not run here; 2 where `tune` can not.

    Raises:
        SystemExit: with code 2 for arguments that do not fit, with code 0 for --help and --version.
    """
    parser = argparse.ArgumentParser(prog="resfuse", description=resfuse.__doc__)
    parser.add_argument("--version", action="version", version=resfuse.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    return COMMANDS[args.command].run(args)
