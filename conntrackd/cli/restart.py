"""`conntrackd restart`: the running daemon becomes the program that is installed now, and no packet is lost."""

import argparse

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, remark

PATIENCE_S = 90.0  # the new process is tried out first


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "restart",
        help="begin the daemon anew, with the program and configuration as they are now; no packet is lost",
        description="The new program is tried out first: if it can't start, the running one goes on.",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do it and wait until the new process answers; returns the exit code."""
    path = api.socket_path(getattr(args, "socket", None))
    (row,) = api.request(path, "restart", timeout_s=PATIENCE_S)
    outcome = msgspec.json.decode(row, type=api.Restart)
    if not outcome.ok:
        remark(outcome.message)
        return EXIT_FAILED
    # The socket stays: who asks now is answered by the new process.
    (row,) = api.request(path, "status", timeout_s=PATIENCE_S)
    status = msgspec.json.decode(row, type=api.Status)
    print(f"conntrackd {status.version} goes on in process {status.pid} with {status.flows} flows.")
    return EXIT_OK
