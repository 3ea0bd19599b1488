"""`conntrackd status`: the state of the running daemon on one screen, what is wrong with it first."""

import argparse
import textwrap

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, GREEN, RED, YELLOW, ago, duration, paint, table

WIDTH = 100  # of sentences
NEAR_PERCENT = 80
COLOURS = {"ok": GREEN, "degraded": YELLOW, "failing": RED, "warning": YELLOW, "error": RED}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("status", help="show the state of the running daemon")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.set_defaults(func=run)


def _snapshot(state: api.StateStatus | None) -> str:
    if state is None:
        return "snapshot none: no state directory is configured"
    last = "none yet"
    if state.age_seconds is not None:
        last = f"{duration(state.age_seconds)} old, {state.flows} flows, {state.bytes} bytes"
    failed = f"; {state.failed} failed, the last because: {state.error}" if state.error else ""
    return f"snapshot {last}, in {state.directory}{failed}"


def run(args: argparse.Namespace) -> int:
    """Show it; returns the exit code."""
    try:
        (row,) = api.request(api.socket_path(getattr(args, "socket", None)), "status")
    except api.DaemonNotRunningError as error:
        raise api.DaemonNotRunningError(f"{error} `conntrackd doctor` says what becomes of packets.") from None
    if args.output == "json":
        print(msgspec.json.format(row).decode())
        return EXIT_OK
    status = msgspec.json.decode(row, type=api.Status)
    _show(status)
    return EXIT_OK


def _show(status: api.Status) -> None:
    print(f"conntrackd {status.version} is {paint(status.health, COLOURS[status.health])}")
    for problem in status.problems:
        label = f"{problem.severity}: "
        lines = textwrap.wrap(problem.message, WIDTH, initial_indent="  " + label, subsequent_indent="    ")
        print("\n".join(lines).replace(label, paint(label, COLOURS[problem.severity]), 1))
    print(
        f"process {status.pid}, {status.core} core, up {duration(status.uptime_seconds)}, "
        f"{status.packets_per_second} packets/s"
    )
    policy = status.policy
    print(f"policy {status.config}, generation {status.generation} of {ago(policy.time)}: {policy.how} by {policy.who}")
    if status.trial_seconds is not None:
        trial = f"on trial: ends in {status.trial_seconds} s unless `conntrackd confirm` keeps it"
        print("  " + paint(trial, YELLOW))
    print(_snapshot(status.state))
    print()
    table(("LIMIT", "USED", "OF", "FULL"), [_limit(limit) for limit in status.limits], _tint)
    print()
    table(
        ("QUEUE", "HOOKS", "WAITING", "PACKETS", "DROPPED", "ERRORS", "LOST"),
        [
            (
                str(queue.number),
                ",".join(queue.hooks),
                f"{queue.waiting}/{queue.max_length}",
                str(queue.packets),
                str(queue.dropped),
                str(queue.errors),
                str(queue.dropped_full + queue.dropped_socket),
            )
            for queue in status.queues
        ],
    )
    print()
    table(
        ("INTERFACE", "INDEX", "ZONE"),
        [(link.name, str(link.index), link.zone or "-") for link in status.interfaces],
    )


def _limit(limit: api.Limit) -> tuple[str, str, str, str]:
    if limit.percent is None:
        return limit.name, str(limit.used), "any number", "-"
    return limit.name, str(limit.used), str(limit.max), f"{limit.percent} %"


def _tint(row: tuple[str, str, str, str]) -> str:
    full = row[-1].partition(" ")[0]
    return YELLOW if full.isdecimal() and int(full) >= NEAR_PERCENT else ""
