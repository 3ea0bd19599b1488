"""`conntrackd confirm`: keep the policy that is on trial."""

import argparse

from conntrackd import api
from conntrackd.cli.changes import add_output, change


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("confirm", help="keep the policy that is on trial (apply --confirm)")
    add_output(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    return change(api.socket_path(getattr(args, "socket", None)), "confirm", {}, args.output)
