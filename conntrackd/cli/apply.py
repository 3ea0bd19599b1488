"""`conntrackd apply`: put a configuration file in force, for good or on trial."""

import argparse
import os
from typing import Any

from conntrackd import api, config
from conntrackd.cli.changes import add_output, change
from conntrackd.cli.output import EXIT_FAILED, EXIT_USAGE, remark
from conntrackd.configfiles import read
from conntrackd.values import time as read_time


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "apply", help="put a configuration file in force, for good or on trial; one with mistakes changes nothing"
    )
    parser.add_argument("file", nargs="?", default=config.DEFAULT_FILE, help="default: %(default)s")
    parser.add_argument(
        "--confirm",
        metavar="TIME",
        type=trial,
        default=0,
        help="on trial: the policy before comes back after so long (60s, 5m) without `conntrackd confirm`",
    )
    parser.add_argument("--force", action="store_true", help="even if it cuts the SSH connection you are on")
    add_output(parser)
    parser.set_defaults(func=run)


def trial(text: str) -> int:
    """Read a time as milliseconds."""
    try:
        milliseconds = read_time(int(text) if text.isascii() and text.isdigit() else text)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(getattr(wrong, "context", {}).get("message", str(wrong))) from None
    if milliseconds < 1000:
        raise argparse.ArgumentTypeError("less than a second is no time to confirm in")
    return milliseconds


def run(args: argparse.Namespace) -> int:
    """Do it and wait until it is done; returns the exit code."""
    from conntrackd.lint import cuts_ssh

    try:
        files = read(args.file)
        checked = config.check(files)
    except config.ConfigErrors as errors:
        remark(str(errors))
        return EXIT_USAGE
    cuts = cuts_ssh(checked)
    if cuts:
        remark(cuts)
        if not args.confirm and not args.force:
            remark("Nothing was changed: use --confirm 60s to try it, or --force.")
            return EXIT_FAILED
    # The daemon works in another directory, and the files of sets count from where the configuration is.
    texts = [{"name": os.path.abspath(file.name), "text": file.text.decode()} for file in files]
    arguments: dict[str, Any] = {"files": texts, "confirm_ms": args.confirm}
    return change(api.socket_path(getattr(args, "socket", None)), "apply", arguments, args.output)
