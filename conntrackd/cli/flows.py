"""`conntrackd flows`: the connections, for people or for scripts."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import msgspec

from conntrackd import api
from conntrackd.cli import expectedtable, flowtable
from conntrackd.cli.filterwords import add_filter, filter_of
from conntrackd.cli.output import EXIT_OK, json_array, json_lines, table_lines

CLEAR_LINE, CLEAR_BELOW, TOP_LEFT = "\x1b[K", "\x1b[J", "\x1b[H"

# What `-o` may say besides `table`: each takes the rows as the daemon sends them, in JSON.
WRITERS: dict[str, Callable[[Iterator[bytes]], None]] = {
    "json": json_array,
    "jsonl": json_lines,
}
CONNTRACK = ("conntrack", "extended", "save", "xml")  # the formats of conntrack(8)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("flows", help="list the connections")
    add_filter(parser)
    parser.add_argument("-o", "--output", choices=["table", *WRITERS, *CONNTRACK], default="table")
    parser.add_argument(
        "--sort",
        choices=list(dict.fromkeys((*flowtable.SORTS, *flowtable.GROUP_SORTS))),
        metavar="KEY",
        help="amounts with the largest first: %(choices)s",
    )
    parser.add_argument("-r", "--reverse", action="store_true", help="in the other order")
    parser.add_argument("-n", type=_count, dest="limit", metavar="N", help="not more than N rows")
    parser.add_argument("--by", choices=list(flowtable.GROUPS), help="count flows, packets and bytes in groups")
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=2.0, metavar="SECONDS", help="again and again, every 2 seconds"
    )
    parser.add_argument("--expected", action="store_true", help="list the connections that helpers expect instead")
    parser.set_defaults(func=lambda args: run(args, parser))


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """List them; returns the exit code."""
    if args.sort is not None and args.sort not in (flowtable.GROUP_SORTS if args.by else flowtable.SORTS):
        known = flowtable.GROUP_SORTS if args.by else flowtable.SORTS
        parser.error(f"argument --sort: expected {', '.join(known)} here, not {args.sort}")
    if args.watch is not None and args.output != "table":
        parser.error("argument --watch: shows a table; for programs, use `conntrackd events`")
    if args.expected and (args.filter or args.by or args.sort):
        parser.error("argument --expected: goes without a filter, --sort and --by")
    if args.output in CONNTRACK and (args.expected or args.by):
        parser.error(f"argument -o: {args.output} is a format for connections: it goes without --expected and --by")
    text = filter_of(args)
    if args.watch is not None:
        _watch(args, text)
    elif args.output == "table":
        for line in _lines(args, text):
            print(line)
    elif args.output in CONNTRACK:
        from conntrackd.cli import ctformat  # takes time to load

        for line in ctformat.lines(flowtable.decoded(_rows(args, text)), args.output, time.time()):
            print(line)
    else:
        WRITERS[args.output](_rows(args, text))
    return EXIT_OK


def _ask(args: argparse.Namespace, text: str) -> Iterator[bytes]:
    path = api.socket_path(getattr(args, "socket", None))
    if args.expected:
        return api.request(path, "expectations")
    return api.request(path, "flows", {"filter": text} if text else {})


def _rows(args: argparse.Namespace, text: str) -> Iterator[bytes]:
    """Ask for the rows that are to be written, as JSON."""
    rows = _ask(args, text)
    if args.by:
        return map(msgspec.json.encode, _groups(args, rows))
    return flowtable.ordered(rows, args.sort, args.reverse, args.limit)


def _groups(args: argparse.Namespace, rows: Iterator[bytes]) -> Iterable[api.Group]:
    groups = flowtable.grouped(flowtable.decoded(rows), args.by)
    groups.sort(key=flowtable.GROUP_SORTS[args.sort or "count"], reverse=args.reverse)
    return groups[: args.limit]


def _lines(args: argparse.Namespace, text: str) -> Iterator[str]:
    """Write the table."""
    if args.expected:
        return table_lines(expectedtable.HEADER, expectedtable.rows(islice(_ask(args, text), args.limit)))
    if args.by:
        rows = (
            [group.key, *map(str, (group.count, group.packets, group.bytes))]
            for group in _groups(args, _ask(args, text))
        )
        return table_lines((args.by.upper(), *flowtable.HEADER_GROUPS), rows)
    flows = flowtable.decoded(_rows(args, text))
    return table_lines(flowtable.HEADER, map(flowtable.cells, flows), flowtable.tint)


def _watch(args: argparse.Namespace, text: str) -> None:
    """Show the table again and again: on a terminal as much as fits, in place; else one below the other."""
    while True:
        moment = time.strftime("%H:%M:%S")
        if sys.stdout.isatty():
            size = os.get_terminal_size()
            lines = [f"{moment}, every {args.watch:g} s"]
            lines += islice(_lines(args, text), size.lines - 2)
            sys.stdout.write(TOP_LEFT + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW)
        else:
            print(moment, *_lines(args, text), "", sep="\n")
        sys.stdout.flush()
        time.sleep(args.watch)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no time between 0.1 s and a day (a FILTER goes before --watch)")
    return seconds
