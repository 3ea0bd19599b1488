"""`conntrackd set`: the sets of addresses of the running daemon."""

import argparse
from typing import Any

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, duration, json_array, table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("set", help="list the sets of addresses; add to one, or take out of one")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the sets, or what is in one")
    listing.add_argument("name", nargs="?", default="")
    listing.add_argument("-o", "--output", choices=["table", "json"], default="table")
    adding = actions.add_parser("add", help="add an address or a network")
    deleting = actions.add_parser("del", help="take out what was added")
    for at in (adding, deleting):
        at.add_argument("name")
        at.add_argument("address")
    adding.add_argument(
        "--timeout", metavar="TIME", type=_time, help="for so long: 1h, 30m (default: the set's; 0: none)"
    )
    parser.set_defaults(func=run)


def _time(text: str) -> int:
    from conntrackd.values import time

    try:
        return time(int(text) if text.isascii() and text.isdigit() else text)
    except ValueError as wrong:
        raise argparse.ArgumentTypeError(getattr(wrong, "context", {}).get("message", str(wrong))) from None


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    path = api.socket_path(getattr(args, "socket", None))
    arguments: dict[str, Any] = {"action": args.action, "name": args.name}
    if args.action != "list":
        arguments["address"] = args.address
        if getattr(args, "timeout", None) is not None:
            arguments["timeout_ms"] = args.timeout
        (row,) = api.request(path, "set", arguments)
        print(msgspec.json.decode(row, type=api.Done).message)
        return EXIT_OK
    rows = api.request(path, "set", arguments)
    if args.output == "json":
        json_array(rows)
    elif args.name:
        entries = (msgspec.json.decode(row, type=api.SetEntry) for row in rows)
        table(("ADDRESS", "FROM", "TIMEOUT"), ((entry.address, _from(entry), _left(entry)) for entry in entries))
    else:
        sets = (msgspec.json.decode(row, type=api.SetRow) for row in rows)
        table(
            ("SET", "CONFIGURED", "ADDED", "SIZE", "REFUSED"),
            ((entry.name, *map(str, (entry.configured, entry.added, entry.size, entry.refused))) for entry in sets),
        )
    return EXIT_OK


def _from(entry: api.SetEntry) -> str:
    return "configuration" if entry.configured else "added"


def _left(entry: api.SetEntry) -> str:
    return "-" if entry.timeout_seconds is None else duration(entry.timeout_seconds)
