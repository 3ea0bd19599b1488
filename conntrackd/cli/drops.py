"""`conntrackd drops`: the packets dropped most recently, and why."""

import argparse
from collections.abc import Iterator

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, endpoint, json_array, json_lines, table

HEADER = ("TIME", "REASON", "RULE", "PROTO", "SOURCE", "DESTINATION", "IN", "OUT")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("drops", help="list the packets dropped most recently, and why")
    parser.add_argument("-o", "--output", choices=["table", "json", "jsonl"], default="table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """List them, the oldest first; returns the exit code."""
    rows = api.request(api.socket_path(getattr(args, "socket", None)), "drops")
    if args.output == "json":
        json_array(rows)
    elif args.output == "jsonl":
        json_lines(rows)
    else:
        table(HEADER, _cells(rows))
    return EXIT_OK


def _cells(rows: Iterator[bytes]) -> Iterator[list[str]]:
    from datetime import datetime

    decoder = msgspec.json.Decoder(api.Drop)
    for row in rows:
        drop = decoder.decode(row)
        target = endpoint(drop.dst, drop.dport)
        if drop.type is not msgspec.UNSET:
            target += f" type {drop.type} code {drop.code}"
        yield [
            datetime.fromisoformat(drop.time).astimezone().strftime("%H:%M:%S.%f")[:-3],
            drop.reason,
            drop.rule or "-",
            drop.protocol or "-",
            endpoint(drop.src, drop.sport),
            target,
            drop.in_ or "-",
            drop.out or "-",
        ]
