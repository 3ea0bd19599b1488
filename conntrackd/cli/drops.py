"""`conntrackd drops`: the packets dropped most recently, and why."""

import argparse
from collections.abc import Iterator
from datetime import datetime

import msgspec

from conntrackd import api
from conntrackd.cli.filterwords import add_filter, filter_of
from conntrackd.cli.output import EXIT_OK, endpoint, json_array, json_lines, remark, table
from conntrackd.cli.times import seconds

HEADER = ("TIME", "REASON", "RULE", "PROTO", "SOURCE", "DESTINATION", "IN", "OUT")
GROUPS = ("src", "dst", "dport", "protocol", "rule", "reason", "in", "out")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("drops", help="list the packets dropped most recently, and why")
    add_filter(parser)
    parser.add_argument("--last", metavar="TIME", type=seconds, help="only those of the last 30s, 10m, 2h")
    parser.add_argument("--by", choices=GROUPS, help="count them in groups, the largest first")
    parser.add_argument("-o", "--output", choices=["table", "json", "jsonl"], default="table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """List them, the oldest first; returns the exit code."""
    asked = {"filter": filter_of(args), "last_ms": int((args.last or 0) * 1000)}
    rows = list(api.request(api.socket_path(getattr(args, "socket", None)), "drops", asked))
    if args.last is not None and len(rows) >= api.DROPS_KEPT:
        remark(f"The daemon remembers the last {api.DROPS_KEPT} drops, and these are all of them: there were more.")
    groups = _groups(rows, args.by) if args.by else []
    if args.output != "table":
        write = json_array if args.output == "json" else json_lines
        write(map(msgspec.json.encode, groups) if args.by else iter(rows))
    elif args.by:
        table((args.by.upper(), "DROPS", "LAST", "REASONS"), map(_group_cells, groups))
    else:
        table(HEADER, _cells(rows))
    return EXIT_OK


def _groups(rows: list[bytes], by: str) -> list[api.DropGroup]:
    groups: dict[str | None, api.DropGroup] = {}
    for row in rows:
        drop = msgspec.json.decode(row)
        key = None if drop.get(by) is None else str(drop[by])
        group = groups.setdefault(key, api.DropGroup(by, key, 0, drop["time"], {}))
        group.count += 1
        group.last = drop["time"]
        group.reasons[drop["reason"]] = group.reasons.get(drop["reason"], 0) + 1
    return sorted(groups.values(), key=lambda group: -group.count)


def _group_cells(group: api.DropGroup) -> list[str]:
    reasons = sorted(group.reasons.items(), key=lambda reason: -reason[1])
    named = ", ".join(f"{reason} {count}" for reason, count in reasons)
    return [group.key or "-", str(group.count), _clock(group.last), named]


def _clock(moment: str) -> str:
    return datetime.fromisoformat(moment).astimezone().strftime("%H:%M:%S.%f")[:-3]


def _cells(rows: list[bytes]) -> Iterator[list[str]]:
    decoder = msgspec.json.Decoder(api.Drop)
    for row in rows:
        drop = decoder.decode(row)
        target = endpoint(drop.dst, drop.dport)
        if drop.type is not msgspec.UNSET:
            target += f" type {drop.type} code {drop.code}"
        yield [
            _clock(drop.time),
            drop.reason,
            drop.rule or "-",
            drop.protocol or "-",
            endpoint(drop.src, drop.sport),
            target,
            drop.in_ or "-",
            drop.out or "-",
        ]
