"""`conntrackd reload`: put the daemon's configuration file in force again, as it is now."""

import argparse

from conntrackd import api
from conntrackd.cli.changes import add_output, change


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "reload", help="put the configuration file in force anew; one with mistakes changes nothing"
    )
    add_output(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do it and wait until it is done; returns the exit code."""
    return change(api.socket_path(getattr(args, "socket", None)), "reload", {}, args.output)
