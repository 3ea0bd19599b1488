"""`conntrackd rules`: the iptables rules that bring packets to the daemon."""

import argparse

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, EXIT_USAGE, ago, json_array, remark, table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "rules",
        help="install, remove or show the rules that bring packets to the daemon; show what the policy's rules did",
    )
    parser.add_argument(
        "action",
        nargs="?",
        default="hits",
        choices=["hits", "show", "install", "remove"],
        help="hits (the default): list the rules of the policy in force, and what each did; "
        "show: print what install loads; install: load our iptables chains, again and again if need be; "
        "remove: take them all out (needs no configuration); a daemon that runs leaves them out until install",
    )
    parser.add_argument("--unused", action="store_true", help="hits: only rules that have decided nothing")
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table", help="of hits")
    parser.add_argument("--config", metavar="FILE", help="configuration (default: /etc/conntrackd/conntrackd.toml)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    if args.action == "hits":
        return _hits(args)
    from conntrackd import config  # takes longer to load than `hits` may take to answer
    from conntrackd.daemon import rules

    try:
        if args.action == "remove":
            said = _let_go(api.socket_path(getattr(args, "socket", None)))
            rules.remove()
            if said:
                remark(said)
            return EXIT_OK
        checked = config.load(args.config or config.DEFAULT_FILE)
        if args.action == "show":
            print(rules.show(checked), end="")
        else:
            rules.install(rules.plans(checked))
    except config.ConfigErrors as errors:
        remark(str(errors))
        return EXIT_USAGE
    except rules.RulesError as error:
        remark(str(error))
        return EXIT_FAILED
    return EXIT_OK


def _let_go(path: str) -> str:
    """Have a daemon that runs leave the rules out, which it would put back; returns what is to be said of it.

    Removing them is the way out when something is broken: what keeps the daemon from listening does not keep us.
    """
    try:
        (row,) = api.request(path, "let_go")
    except api.DaemonNotRunningError:
        return ""
    except api.RequestError as error:
        return f"The daemon could not be told, and may put the rules back (rules.watch): {error}"
    return msgspec.json.decode(row, type=api.Done).message


def _hits(args: argparse.Namespace) -> int:
    encoded = api.request(api.socket_path(getattr(args, "socket", None)), "rules")
    rows = [msgspec.json.decode(row, type=api.RuleRow) for row in encoded]
    if args.unused:
        rows = [row for row in rows if not row.hits and not row.name.startswith("default-")]
    if args.output == "json":
        json_array(map(msgspec.json.encode, rows))
        return EXIT_OK
    table(
        ("RULE", "ACTION", "HITS", "FLOWS", "LIVE", "PACKETS", "BYTES", "LAST HIT"),
        [
            (
                row.name,
                row.action,
                *map(str, (row.hits, row.flows, row.live, row.packets, row.bytes)),
                ago(row.last_hit),
            )
            for row in rows
        ],
    )
    return EXIT_OK
