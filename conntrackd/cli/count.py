"""`conntrackd count`: how many connections there are."""

import argparse

import msgspec

from conntrackd import api
from conntrackd.cli.filterwords import add_filter, filter_of
from conntrackd.cli.output import EXIT_OK


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("count", help="count the connections")
    add_filter(parser)
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the number; returns the exit code."""
    text = filter_of(args)
    (row,) = api.request(api.socket_path(getattr(args, "socket", None)), "count", {"filter": text})
    if args.output == "json":
        print(msgspec.json.format(row).decode())
    else:
        print(msgspec.json.decode(row, type=api.Count).count)
    return EXIT_OK
