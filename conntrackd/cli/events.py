"""`conntrackd events`: what happens to connections, as it happens."""

import argparse
import sys
from collections.abc import Iterator

import msgspec

from conntrackd import api
from conntrackd.cli import expectedtable
from conntrackd.cli.filterwords import add_filter, filter_of
from conntrackd.cli.flowtable import labels
from conntrackd.cli.output import EXIT_OK, endpoint, remark
from conntrackd.cli.times import seconds

LOST = b'{"type":"LOST"'


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("events", help="follow what happens to connections")
    add_filter(parser)
    parser.add_argument(
        "-o", "--output", choices=["table", "json", "jsonl"], default="table", help="json, jsonl: an object per line"
    )
    parser.add_argument("--expected", action="store_true", help="what happens to connections that helpers expect")
    parser.add_argument("--for", dest="seconds", metavar="TIME", type=seconds, help="end after TIME, as 30s or 5m")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Follow them until the time is over or the daemon ends; returns the exit code."""
    text = filter_of(args)
    wanted = {"filter": text, "expected": args.expected}
    rows = api.listen(api.socket_path(getattr(args, "socket", None)), "events", args.seconds, wanted)
    if args.output == "table":
        for line in (_expected_lines if args.expected else _lines)(rows):
            print(line, flush=True)
        return EXIT_OK
    for row in rows:
        sys.stdout.buffer.write(row + b"\n")
        sys.stdout.buffer.flush()
    return EXIT_OK


def _lines(rows: Iterator[bytes]) -> Iterator[str]:
    """Write events as conntrack -E does: one a line, the columns not wider than they must be."""
    decoder = msgspec.json.Decoder(api.Event)
    for row in _without_losses(rows):
        event = decoder.decode(row)
        flow = event.flow
        yield " ".join(
            word
            for word in (
                _clock(event.time),
                f"{event.type:<7}",
                flow.protocol,
                flow.state,
                endpoint(flow.orig.src, flow.orig.sport),
                ">",
                endpoint(flow.orig.dst, flow.orig.dport),
                "" if "SEEN_REPLY" in flow.status else "UNREPLIED",
                "ASSURED" if "ASSURED" in flow.status else "",
                f"zone={flow.zone}" if flow.zone else "",
                f"rule={flow.rule}" if flow.rule else "",
                labels(flow),
                f"reason={event.reason}" if event.reason else "",
            )
            if word
        )


def _expected_lines(rows: Iterator[bytes]) -> Iterator[str]:
    decoder = msgspec.json.Decoder(api.ExpectationEvent)
    for row in _without_losses(rows):
        event = decoder.decode(row)
        expected = event.expectation
        source, target = expectedtable.ends(expected)
        yield (
            f"{_clock(event.time)} {event.type:<7} {expected.protocol} {source} > {target} "
            f"helper={expected.helper} master={expected.master}"
        )


def _without_losses(rows: Iterator[bytes]) -> Iterator[bytes]:
    """Say on stderr what was lost, and go on."""
    for row in rows:
        if row.startswith(LOST):
            lost = msgspec.json.decode(row, type=api.Lost)
            remark(f"{lost.count} events are missing here: they came faster than they were read")
        else:
            yield row


def _clock(time: str) -> str:
    from datetime import datetime

    return datetime.fromisoformat(time).astimezone().strftime("%H:%M:%S.%f")[:-3]
