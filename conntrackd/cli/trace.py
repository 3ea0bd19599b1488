"""`conntrackd trace`: what the daemon does with packets, step by step, while it does it."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from conntrackd import api
from conntrackd.cli.filterwords import add_filter, filter_of
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, endpoint, remark
from conntrackd.cli.times import seconds

if TYPE_CHECKING:
    from conntrackd.cli.pcapng import Capture


class Kind(msgspec.Struct):
    """What every row of a trace begins with."""

    type: str


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "trace",
        help="follow packets through the hooks: connection, rule, verdict and reason",
        description="Follow the packets of the connections that FILTER chooses. A packet without a connection is "
        "chosen by what it is itself; one that has no tuple at all is seen only without a filter.",
    )
    add_filter(parser)
    parser.add_argument("--for", dest="seconds", metavar="TIME", type=seconds, help="end after TIME, as 30s or 5m")
    parser.add_argument("--pcap", metavar="FILE", help="write the packets to FILE as well, as pcapng; needs root")
    parser.add_argument(
        "-o", "--output", choices=["table", "json", "jsonl"], default="table", help="json, jsonl: an object per line"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Follow them until the time is over or the daemon ends; returns the exit code."""
    arguments = {"filter": filter_of(args), "bytes": args.pcap is not None}
    rows = api.listen(api.socket_path(getattr(args, "socket", None)), "trace", args.seconds, arguments)
    try:
        with _capture(args.pcap) as capture:
            _follow(rows, args.output, capture)
    except OSError as error:
        if error.filename is None:
            raise
        remark(f"{error.filename} can't be written: {error.strerror}.")
        return EXIT_FAILED
    return EXIT_OK


def _capture(path: str | None) -> "AbstractContextManager[Capture | None]":
    if path is None:
        return nullcontext()
    from conntrackd.cli.pcapng import Capture

    return closing(Capture(path))


def _follow(rows: Iterator[bytes], output: str, capture: "Capture | None") -> None:
    decoder = msgspec.json.Decoder(Kind)
    for encoded in rows:
        kind = decoder.decode(encoded).type
        if kind == "STEP":
            step = msgspec.json.decode(encoded, type=api.TraceStep)
            if capture is not None and step.data is not msgspec.UNSET:
                seconds_ = datetime.fromisoformat(step.time).timestamp()
                where = f"{step.hook} {step.out if step.hook == 'POSTROUTING' else step.in_ or 'self'}"
                capture.packet(step.data, step.length, seconds_, where, _outcome(step))
                encoded = msgspec.json.encode(msgspec.structs.replace(step, data=msgspec.UNSET))
            if output == "table":
                print(_line(step), flush=True)
        elif kind == "LOST":
            lost = msgspec.json.decode(encoded, type=api.TraceLost)
            if output == "table":
                remark(_missing(lost))
        elif output == "table":
            begin = msgspec.json.decode(encoded, type=api.TraceBegin)
            remark(f"Tracing, at most {begin.steps_per_second} steps a second; Ctrl-C ends it.")
        if output != "table":
            sys.stdout.buffer.write(encoded + b"\n")
            sys.stdout.buffer.flush()


def _missing(lost: api.TraceLost) -> str:
    steps = f"{lost.steps} steps are missing here: they came faster than they are told" if lost.steps else ""
    packets = f"{lost.packets} packets were not looked at: they came too fast" if lost.packets else ""
    return "; ".join(filter(None, (steps, packets)))


def _line(step: api.TraceStep) -> str:
    """Write a step: when, where, what came of it, the packet; then what is known of its connection, as key=value."""
    moment = datetime.fromisoformat(step.time).astimezone().strftime("%H:%M:%S.%f")[:-3]
    return f"{moment} {step.hook:<11} {step.verdict:<6} {_packet(step.packet)} {_details(step)}"


def _outcome(step: api.TraceStep) -> str:
    return f"{step.hook} {step.verdict} {_details(step)}"


def _details(step: api.TraceStep) -> str:
    pairs = [
        ("in", step.in_),
        ("out", step.out),
        ("len", str(step.length)),
        ("class", step.class_),
        ("ctinfo", step.ctinfo if step.class_ == "INVALID" else None),
        ("flow", step.flow),
        ("zone", step.zone or None),
        ("state", _change(step.state_before or "none", step.state)),
        ("status", _change(",".join(step.status_before) or "none", ",".join(step.status))),
        ("rule", step.rule),
        ("reason", step.reason),
        ("mark", _change(f"{step.mark_before:#x}", f"{step.mark:#x}")),
    ]
    return " ".join(f"{name}={value}" for name, value in pairs if value is not None)


def _change(before: str, after: str | None) -> str | None:
    """Write what was and what is, if it is another."""
    if not after or before == after:
        return after or None
    return f"{before}>{after}"


def _packet(packet: api.Packet | None) -> str:
    if packet is None:
        return "(no tuple)"
    target = endpoint(packet.dst, packet.dport)
    if packet.type is not msgspec.UNSET:
        target += f" type {packet.type} code {packet.code} id {packet.id}"
    return f"{packet.protocol} {endpoint(packet.src, packet.sport)} > {target}"
