"""The command line: finds the command, runs it, and turns what went wrong into a sentence and an exit code.

Each command is a module beside this one with `add_parser(subparsers)`, whose parser sets `func(args) -> exit
code`. Only the module of the command in use is imported: the client answers in the time of a Python start.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from conntrackd.cli.output import EXIT_FAILED, EXIT_NOT_RUNNING, EXIT_OK, EXIT_USAGE, remark

COMMANDS = {
    "run": "run the daemon in the foreground",
    "check": "check a configuration file; changes nothing",
    "rules": "install, remove or show the rules that bring packets to the daemon; show what the policy's rules did",
    "status": "show the state of the running daemon",
    "doctor": "say what on this machine keeps conntrackd from its work, and what to do about it",
    "flows": "list the connections, in an order or in groups; --watch them",
    "flow": "show everything about one connection",
    "count": "count the connections",
    "kill": "end connections",
    "top": "watch the connections that lead by rate, bytes or age; end some",
    "stats": "show the counters",
    "events": "follow what happens to connections",
    "drops": "list the packets dropped most recently, and why",
    "trace": "follow packets through the hooks: connection, rule, verdict and reason",
    "explain": "say which rule decides about a packet, and why; nothing is sent",
    "label": "list the labels; give some to connections, or take some away",
    "set": "list the sets of addresses; add to one, or take out of one",
    "diff": "show what a configuration file would change; changes nothing",
    "restart": "begin the daemon anew, with the program and configuration as they are now; no packet is lost",
    "reload": "put the configuration file in force anew",
    "apply": "put a configuration file in force, for good or on trial",
    "confirm": "keep the policy that is on trial",
    "rollback": "put the policy before this one in force again",
    "history": "list the generations of the policy, or print the files of one",
    "ct": "speak conntrack(8): its options and its output, for existing scripts",
    "completion": "print the script by which bash, zsh or fish completes this command line",
    "schema": "print the JSON Schema of the configuration, or of what a command prints with -o json",
}


class _Parser(argparse.ArgumentParser):
    """Says of a wrong word which right one is near it, where argparse lists them all."""

    def error(self, message: str) -> NoReturn:
        from conntrackd.mistakes import nearest

        found = re.fullmatch(r"(.*): invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        hint = nearest(found[2], re.findall(r"'([^']*)'", found[3])) if found else ""
        super().error(f"{found[1]}: there is no {found[2]!r}; {hint}" if found and hint else message)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        from conntrackd.core import compiled

        print(f"conntrackd {version('conntrackd')} ({'compiled' if compiled() else 'pure'} core)")
        parser.exit()


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser for these words of a command line; the others have a name only."""
    parser = _Parser(
        prog="conntrackd",
        description="A stateful firewall daemon whose connection tracker runs in userspace.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 the daemon is not running.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, summary in COMMANDS.items():
        if command in words:
            importlib.import_module(f"conntrackd.cli.{command}").add_parser(subparsers)
        else:
            subparsers.add_parser(command, help=summary)
    _add_socket(parser)
    return parser


def _add_socket(parser: argparse.ArgumentParser) -> None:
    """Add --socket before and after each command and action: the last that is given counts, so none has a default."""
    parser.add_argument(
        "--socket",
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="control socket (else $CONNTRACKD_SOCKET, else /run/conntrackd/control.sock)",
    )
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action.choices.values():
                _add_socket(choice)


def main() -> int:
    """Run the command line; returns the exit code."""
    args = build_parser(sys.argv[1:]).parse_args()
    try:
        code: int = args.func(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        return 128 + 2
    except Exception as error:
        code = _code_of(error)
        remark(str(error))
    return code


def _code_of(error: Exception) -> int:
    """Tell the errors that are sentences for the operator from our own mistakes, which go on with a traceback."""
    from conntrackd import api

    if isinstance(error, api.DaemonNotRunningError):
        return EXIT_NOT_RUNNING
    if isinstance(error, api.RequestError):
        return EXIT_FAILED
    from conntrackd.filter import FilterError

    if isinstance(error, FilterError):
        return EXIT_USAGE
    raise error
