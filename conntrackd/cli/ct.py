"""`conntrackd ct`: the options and the output of conntrack(8), for scripts that know that tool (docs/ct.md)."""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Final

import msgspec

from conntrackd import api
from conntrackd.cli import ctformat
from conntrackd.cli.ctformat import Message, Show
from conntrackd.cli.ctselect import (
    ADDRESSES,
    GRE,
    ICMP,
    PORT_PROTOCOLS,
    PORTS,
    OptionError,
    Selection,
    bits,
    choices,
    protocol_name,
    select,
)
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, EXIT_USAGE, remark

TOOL: Final = "conntrack v1.4.7 (conntrack-tools)"  # what scripts expect at the head of a remark
OUTPUTS: Final = ("xml", "extended", "timestamp", "id", "ktimestamp", "labels", "userspace", "save")
EVENTS: Final = {"ALL": ("NEW", "UPDATE", "DESTROY"), "NEW": ("NEW",), "UPDATES": ("UPDATE",), "DESTROY": ("DESTROY",)}
TABLES: Final = ("conntrack", "expect", "dying", "unconfirmed")
COMMANDS: Final = {
    "dump": "-L", "get": "-G", "delete": "-D", "event": "-E", "count": "-C", "stats": "-S", "flush": "-F",
    "update": "-U",
}  # fmt: skip
HELP: Final = {
    "dump": "list the connections, or what helpers expect",
    "get": "show the connection with exactly this tuple",
    "delete": "end connections, and show them",
    "event": "follow what happens to connections, until SIGINT or SIGTERM",
    "count": "count the connections, or the expectations",
    "stats": "show the counters",
    "flush": "end all connections; nothing is asked",
    "update": "change the labels of connections, and show them",
}
STATS: Final = (
    "found", "invalid", "insert", "insert_failed", "drop", "early_drop", "error", "search_restart", "clash_resolve",
    "chaintoolong",
)  # fmt: skip
EXPECT_STATS: Final = ("expect_new", "expect_create", "expect_delete")
LOST: Final = b'{"type":"LOST"'
IDS_AT_ONCE: Final = 256  # in one filter

SELECTING: Final = (
    *ADDRESSES, "mask_src", "mask_dst", "protonum", *PORTS, "state", *ICMP, *GRE, "status", "mark", "zone", "id",
    "label", "src_nat", "dst_nat", "any_nat",
)  # fmt: skip
# Which of the other options a command takes besides.
TAKES: Final = {
    "dump": (*SELECTING, "family", "output"),
    "get": (*SELECTING, "family", "output"),
    "delete": (*SELECTING, "family", "output"),
    "event": (*SELECTING, "family", "output", "event_mask", "buffer_size"),
    "count": (),
    "stats": (),
    "flush": ("family",),
    "update": (*(name for name in SELECTING if name != "mark"), "family", "output", "label_add", "label_del"),
}
NOT_HERE: Final = {
    ("-I", "--create"): "a connection is begun by a packet that the policy admits, by nothing else",
    ("-A", "--add"): "a connection is begun by a packet that the policy admits, by nothing else",
    ("-R", "--load-file"): "a connection is begun by a packet that the policy admits, by nothing else",
    ("-z", "--zero"): "the counters belong to all who read them",
    ("-t", "--timeout"): "a timeout is set by the configuration, and chooses nothing",
    ("-c", "--secmark"): "there are no security marks",
    ("-a", "--nat-range"): "addresses are translated elsewhere",
    ("--orig-zone",): "a zone is the same in both directions: use -w",
    ("--reply-zone",): "a zone is the same in both directions: use -w",
    ("--orig-vtag",): "verification tags are not looked for",
    ("--reply-vtag",): "verification tags are not looked for",
    ("--tuple-src",): "expectations are listed and counted only",
    ("--tuple-dst",): "expectations are listed and counted only",
}


class _Stop(BaseException):
    """SIGINT or SIGTERM has come: what was asked for is complete."""


class _Refuse(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        option = "/".join(self.option_strings)
        parser.error(f"{option} is not for conntrackd: {NOT_HERE[tuple(self.option_strings)]}")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "ct",
        help="speak conntrack(8): its options and its output, for existing scripts",
        usage="conntrackd ct -L|-G|-D|-U|-E|-C|-S|-F [TABLE] [OPTIONS]",
        description="The options and the output of conntrack(8). TABLE is conntrack, or expect with -L, -C and -S.",
        epilog="Exit codes: 0 done, 1 failed or nothing was there to delete, 2 wrong options, 3 the daemon is not "
        "running. docs/ct.md lists what differs from conntrack(8).",
    )
    commands = parser.add_argument_group("commands").add_mutually_exclusive_group()
    for name, short in COMMANDS.items():
        commands.add_argument(short, f"--{name}", nargs="?", const=TABLES[0], metavar="TABLE", help=HELP[name])
    commands.add_argument(
        "-V", "--version", action="store_true", help="show the version of conntrack(8) that this is like"
    )
    _add_selecting(parser.add_argument_group("which connections"))
    _add_protocols(parser.add_argument_group("which connections of one protocol (with -p)"))
    labels = parser.add_argument_group("what is changed (with -U)").add_mutually_exclusive_group()
    labels.add_argument("--label-add", metavar="LABEL,...", action="append", help="add labels")
    labels.add_argument(
        "--label-del", metavar="LABEL,...", action="append", nargs="?", const="", help="take these labels away, or all"
    )
    others = parser.add_argument_group("output")
    others.add_argument("-o", "--output", metavar="FORMAT,...", action="append", help=", ".join(OUTPUTS))
    others.add_argument("-e", "--event-mask", metavar="EVENT,...", action="append", help="ALL, NEW, UPDATES, DESTROY")
    others.add_argument("--labelmap", metavar="FILE", help="the names of labels (else those of the configuration)")
    others.add_argument("-b", "--buffer-size", metavar="BYTES", help="has no effect: events wait in the daemon")
    for options in NOT_HERE:
        parser.add_argument(*options, action=_Refuse, nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(func=run, print_help=parser.print_help)


def _add_selecting(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "-s", "--src", "--orig-src", metavar="ADDRESS", help="source of the original direction; a network, too"
    )
    group.add_argument("-d", "--dst", "--orig-dst", metavar="ADDRESS", help="destination of the original direction")
    group.add_argument("-r", "--reply-src", metavar="ADDRESS", help="source of the reply direction")
    group.add_argument("-q", "--reply-dst", metavar="ADDRESS", help="destination of the reply direction")
    group.add_argument("--mask-src", metavar="MASK", help="of the source, as 255.255.255.0")
    group.add_argument("--mask-dst", metavar="MASK", help="of the destination")
    group.add_argument("-f", "--family", metavar="FAMILY", help="ipv4, ipv6; else both")
    group.add_argument("-p", "--protonum", "--proto", metavar="PROTOCOL", help="tcp, udp, icmp, ... or a number")
    group.add_argument("-m", "--mark", metavar="MARK[/MASK]")
    group.add_argument(
        "-u", "--status", metavar="STATUS,...", help="ASSURED, SEEN_REPLY, UNREPLIED, EXPECTED; all of them"
    )
    group.add_argument("-w", "--zone", metavar="ZONE", help="conntrack zone")
    group.add_argument("-i", "--id", metavar="ID")
    group.add_argument("-l", "--label", metavar="LABEL,...", action="append", help="all of them")
    for short, name in (("-n", "--src-nat"), ("-g", "--dst-nat"), ("-j", "--any-nat")):
        group.add_argument(
            short, name, nargs="?", const="", metavar="ADDRESS[:PORT]", help="whose address is translated"
        )


def _add_protocols(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--sport", "--orig-port-src", metavar="PORT", help="tcp, udp, udplite and sctp, as the next three"
    )
    group.add_argument("--dport", "--orig-port-dst", metavar="PORT")
    group.add_argument("--reply-port-src", metavar="PORT")
    group.add_argument("--reply-port-dst", metavar="PORT")
    group.add_argument("--state", metavar="STATE", help="tcp and sctp: ESTABLISHED, ...")
    for name in ICMP:
        option = name.replace("_", "-")
        group.add_argument(f"--{option}", f"--{option.replace('icmp', 'icmpv6')}", metavar="NUMBER")
    for name in GRE:
        group.add_argument(f"--{name.replace('_', '-')}", metavar="KEY")


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code."""
    try:
        return _run(args)
    except OptionError as error:
        _say(str(error))
        remark("Try `conntrackd ct --help' for more information.")
        return EXIT_USAGE


def _run(args: argparse.Namespace) -> int:
    command = next((name for name in COMMANDS if getattr(args, name) is not None), "")
    if args.version:
        print(TOOL)
        return EXIT_OK
    if not command:
        if _given(args):
            raise OptionError("You need to supply a command: -L, -G, -D, -U, -E, -C, -S or -F")
        args.print_help()
        return EXIT_OK
    path = api.socket_path(getattr(args, "socket", None))
    expected = _table(command, getattr(args, command)) == "expect"
    takes = ("family", "output") if expected and command == "dump" else () if expected else TAKES[command]
    for option in _given(args):
        if option not in takes:
            raise OptionError(f"Illegal option `--{option.replace('_', '-')}' with this command")
    if command == "stats":
        return _stats(path, EXPECT_STATS if expected else STATS)
    if command == "count":
        return _count(path, expected)
    outputs = _outputs(args.output or [])
    if expected:
        return _expectations(path, args.family, outputs)
    label_add, label_del = args.label_add or [], args.label_del or []
    if command == "update" and not label_add and not label_del:
        raise OptionError("nothing but labels can be changed: you need to supply `--label-add' or `--label-del'")
    wanted = "labels" in outputs or args.label or label_add or any(label_del)
    names, shown = _labels(path, args.labelmap) if wanted else ({}, None)
    selection = select(args, names)
    show = Show(
        extended="extended" in outputs,
        id="id" in outputs,
        timestamp="timestamp" in outputs,
        ktimestamp="ktimestamp" in outputs,
        labels=shown if "labels" in outputs else None,
    )
    line = _line(outputs, show)
    if command == "dump":
        return _dump(path, selection, line, "xml" in outputs)
    if command == "get":
        return _get(args, path, selection, line, "xml" in outputs)
    if command == "delete":
        return _delete(
            path, selection, lambda message: ctformat.save(message, "-D") if "save" in outputs else line(message)
        )
    if command == "update":
        return _update(path, selection, line, bits(label_add, names), bits(filter(None, label_del), names))
    if command == "event":
        return _events(path, selection, line, "xml" in outputs, _event_types(args.event_mask or ["ALL"]))
    _kill(path, selection)
    _say("connection tracking table has been emptied.")
    return EXIT_OK


def _say(sentence: str) -> None:
    sys.stdout.flush()
    remark(f"{TOOL}: {sentence}")


def _given(args: argparse.Namespace) -> list[str]:
    """List the options that are given, other than the command."""
    return [
        name
        for name in (*SELECTING, "family", "output", "event_mask", "buffer_size", "label_add", "label_del")
        if getattr(args, name) is not None
    ]


def _table(command: str, word: str) -> str:
    """Find the table that a command is about; its beginning is enough."""
    table = next((name for name in TABLES if name.startswith(word)), "")
    if not table:
        raise OptionError(f"unknown type `{word}'")
    if table not in ("conntrack", "expect"):
        raise OptionError(f"`{table}' is not listed: a connection is shown from its confirmation to its end")
    if table == "expect" and command not in ("dump", "count", "stats"):
        raise OptionError(f"Can't do --{command} on expectations")
    return table


def _outputs(texts: list[str]) -> set[str]:
    chosen = set(choices(texts, OUTPUTS))
    if "save" in chosen and len(chosen - {"userspace"}) > 1:
        raise OptionError("cannot combine save output with any other output type, use -o save only")
    return chosen


def _event_types(texts: list[str]) -> set[str]:
    return {kind for name in choices(texts, tuple(EVENTS)) for kind in EVENTS[name]}


def _labels(path: str, labelmap: str | None) -> tuple[dict[str, int], dict[str, str] | None]:
    """Tell the bits of the labels that options may name, and what the daemon's names are to be called."""
    rows = api.request(path, "label", {"action": "list"})
    ours = {label.bit: label.name for label in (msgspec.json.decode(row, type=api.Label) for row in rows)}
    names = ours
    if labelmap is not None:
        try:
            names = ctformat.read_labels(labelmap)
        except OSError as error:
            remark(f"nfct_labelmap_new: {error.strerror}")
            return {}, None
    return {name: bit for bit, name in names.items()}, {ours.get(bit, str(bit)): name for bit, name in names.items()}


def _line(outputs: set[str], show: Show) -> Callable[[Message], str]:
    """Choose how a connection is written."""
    if "save" in outputs:
        return ctformat.save
    if "xml" in outputs:
        return lambda message: ctformat.xml(message, show)
    return lambda message: ctformat.text(message, show)


@contextmanager
def _document(xml: bool) -> Iterator[Callable[[str], None]]:
    """Print lines, inside of an XML document where they are XML. As conntrack(8): no line, no document."""
    begun = False

    def put(line: str) -> None:
        nonlocal begun
        if xml and not begun:
            print(ctformat.XML_HEAD)
        begun = True
        print(line)

    yield put
    if xml and begun:
        print(ctformat.XML_END)


def _flows(path: str, selection: Selection) -> Iterator[api.Flow]:
    decoder = msgspec.json.Decoder(api.Flow)
    flows = map(decoder.decode, api.request(path, "flows", {"filter": selection.filter}))
    return filter(selection.takes, flows)


def _dump(path: str, selection: Selection, line: Callable[[Message], str], xml: bool) -> int:
    count, now = 0, time.time()
    with _document(xml) as put:
        for flow in _flows(path, selection):
            put(line(ctformat.of_flow(flow, now)))
            count += 1
    _say(f"{count} flow entries have been shown.")
    return EXIT_OK


def _get(args: argparse.Namespace, path: str, selection: Selection, line: Callable[[Message], str], xml: bool) -> int:
    _check_exact(args)
    if args.zone is None:
        selection = selection._replace(filter=f"{selection.filter} and zone 0")
    flow = next(_flows(path, selection), None)
    if flow is None:
        _say("Operation failed: such conntrack doesn't exist")
        return EXIT_FAILED
    with _document(xml) as put:
        put(line(ctformat.of_flow(flow, time.time())))
    _say("1 flow entries have been shown.")
    return EXIT_OK


def _check_exact(args: argparse.Namespace) -> None:
    """Refuse what is not the whole tuple of one direction."""
    if args.protonum is None:
        raise OptionError("You need to supply the `--protonum' option for this command")
    pairs = [(("src", "dst"), ("reply_src", "reply_dst"))]
    if protocol_name(args.protonum) in PORT_PROTOCOLS:
        pairs.append((("sport", "dport"), ("reply_port_src", "reply_port_dst")))
    for original, reply in pairs:
        if not any(all(getattr(args, name) is not None for name in pair) for pair in (original, reply)):
            raise OptionError(f"you have to specify `--{original[0]}' and `--{original[1]}'")


def _delete(path: str, selection: Selection, line: Callable[[Message], str]) -> int:
    killed, now = _kill(path, selection), time.time()
    for flow in killed:
        print(line(ctformat.of_flow(flow, now)))
    _say(f"{len(killed)} flow entries have been deleted.")
    return EXIT_OK if killed else EXIT_FAILED


def _kill(path: str, selection: Selection) -> list[api.Flow]:
    """End the chosen connections; those that were there."""
    decoder = msgspec.json.Decoder(api.Flow)
    return [
        decoder.decode(row)
        for text in _filters(path, selection)
        for row in api.request(path, "kill", {"filter": text, "dry_run": False})
    ]


def _filters(path: str, selection: Selection) -> Iterator[str]:
    """Say what is chosen in filters alone: what they can't say the daemon is asked for before."""
    if not selection.checks:
        yield selection.filter or "all"
        return
    ids = (str(flow.id) for flow in list(_flows(path, selection)))
    while some := ",".join(islice(ids, IDS_AT_ONCE)):
        yield f"id {some}"


def _update(path: str, selection: Selection, line: Callable[[Message], str], add: list[int], take: list[int]) -> int:
    """Change labels, and show the connections that have others now; without any to add or take, all are taken."""
    change = {"action": "add" if add else "del", "labels": list(map(str, add or take))}
    changed, now = [], time.time()
    for text in _filters(path, selection):
        rows = api.request(path, "label", change | {"filter": text})
        changed += [msgspec.json.decode(row, type=api.Flow) for row in rows]
    for flow in changed:
        print(line(ctformat.of_flow(flow, now)))
    _say(f"{len(changed)} flow entries have been updated.")
    return EXIT_OK if changed else EXIT_FAILED


def _events(path: str, selection: Selection, line: Callable[[Message], str], xml: bool, types: set[str]) -> int:
    decoder, count = msgspec.json.Decoder(api.Event), 0
    with _document(xml) as put:
        for row in _until_signal(api.listen(path, "events", None, {"filter": selection.filter})):
            if row.startswith(LOST):
                lost = msgspec.json.decode(row, type=api.Lost).count
                remark(f"WARNING: {lost} events are missing here: they came faster than they were read")
                continue
            event = decoder.decode(row)
            if event.type in types and selection.takes(event.flow):
                put(line(ctformat.of_event(event)))
                sys.stdout.flush()
                count += 1
    _say(f"{count} flow events have been shown.")
    return EXIT_OK


def _until_signal(rows: Iterator[bytes]) -> Iterator[bytes]:
    """Pass rows on until SIGINT or SIGTERM. A row that has come is dealt with first."""
    waiting = stopped = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        if waiting:
            raise _Stop

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    try:
        while not stopped:
            waiting = True
            row = next(rows)
            waiting = False
            yield row
    except _Stop:
        return


def _expectations(path: str, family: str | None, outputs: set[str]) -> int:
    if outputs - {"extended", "id", "userspace"}:
        raise OptionError("expectations have one format only: no -o with them")
    decoder = msgspec.json.Decoder(api.Expectation)
    expected = [
        each for each in map(decoder.decode, api.request(path, "expectations")) if family in (None, each.family)
    ]
    masters = _by_id(path, {each.master for each in expected})
    shown = [each for each in expected if each.master in masters]  # one whose master has just ended is over, too
    for each in shown:
        print(ctformat.expectation(each, masters[each.master]))
    _say(f"{len(shown)} expectations have been shown.")
    return EXIT_OK


def _by_id(path: str, ids: Iterable[int]) -> dict[int, api.Flow]:
    found: dict[int, api.Flow] = {}
    wanted = map(str, sorted(ids))
    while some := ",".join(islice(wanted, IDS_AT_ONCE)):
        found |= {flow.id: flow for flow in _flows(path, Selection(f"id {some}", ()))}
    return found


def _count(path: str, expected: bool) -> int:
    if expected:
        print(sum(1 for _ in api.request(path, "expectations")))
    else:
        print(msgspec.json.decode(next(api.request(path, "count", {"filter": ""})))["count"])
    return EXIT_OK


def _stats(path: str, names: tuple[str, ...]) -> int:
    stats = msgspec.json.decode(next(api.request(path, "stats")), type=api.Stats)
    print("cpu=0   \t" + "".join(f"{name}={getattr(stats, name)} " for name in names))
    return EXIT_OK
