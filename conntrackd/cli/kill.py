"""`conntrackd kill`: end the connections that a filter chooses."""

import argparse
import sys

import msgspec

from conntrackd import api
from conntrackd.cli import expectedtable, flowtable
from conntrackd.cli.filterwords import add_filter, filter_of
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, Counted, json_array, json_lines, remark, table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("kill", help="end connections; it is no failure if there are none")
    add_filter(parser, required=True)
    parser.add_argument("--expected", action="store_true", help="end what their helpers expect instead")
    parser.add_argument("--dry-run", action="store_true", help="show which ones it would be; end none")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask, which only happens on a terminal")
    parser.add_argument("-o", "--output", choices=["table", "json", "jsonl"], default="table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """End them and show which; returns the exit code."""
    path, text = api.socket_path(getattr(args, "socket", None)), filter_of(args)
    if not args.dry_run and not args.yes and not args.expected and sys.stdin.isatty() and sys.stdout.isatty():
        (row,) = api.request(path, "count", {"filter": text})
        count = msgspec.json.decode(row, type=api.Count).count
        if count and input(f"End {_flows(count)}? [y/N] ").strip().lower() not in ("y", "yes"):
            remark("Nothing was changed.")
            return EXIT_FAILED
    wanted = {"filter": text, "dry_run": args.dry_run, "expected": args.expected}
    rows = Counted(api.request(path, "kill", wanted))
    if args.output == "json":
        json_array(rows)
    elif args.output == "jsonl":
        json_lines(rows)
    elif args.expected:
        table(expectedtable.HEADER, expectedtable.rows(rows))
    else:
        table(flowtable.HEADER, map(flowtable.cells, flowtable.decoded(rows)), flowtable.tint)
    end = " would be ended: nothing was changed." if args.dry_run else " ended."
    remark((_expectations if args.expected else _flows)(rows.count) + end)
    return EXIT_OK


def _expectations(count: int) -> str:
    return f"{count} expectation{'' if count == 1 else 's'}"


def _flows(count: int) -> str:
    return f"{count} flow{'' if count == 1 else 's'}"
