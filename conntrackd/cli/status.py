"""`conntrackd status`: the state of the running daemon on one screen."""

import argparse

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, duration, table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("status", help="show the state of the running daemon")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Show it; returns the exit code."""
    (row,) = api.request(api.socket_path(getattr(args, "socket", None)), "status")
    if args.output == "json":
        print(msgspec.json.format(row).decode())
        return EXIT_OK
    status = msgspec.json.decode(row, type=api.Status)
    print(
        f"conntrackd {status.version} ({status.core} core), process {status.pid}, up {duration(status.uptime_seconds)}"
    )
    print(f"configuration {status.config}, generation {status.generation}")
    print(f"flows {status.flows} of {status.flows_max or 'any number'}")
    print(f"unconfirmed {status.unconfirmed} of {status.unconfirmed_max}")
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
    return EXIT_OK
