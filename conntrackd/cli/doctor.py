"""`conntrackd doctor`: what on this machine keeps conntrackd from its work, and what to do about it."""

import argparse
import textwrap

import msgspec

from conntrackd import api, config
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, GREEN, RED, YELLOW, paint

WIDTH = 100
COLOURS = {"ok": GREEN, "warning": YELLOW, "error": RED}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("doctor", help="say what on this machine keeps conntrackd from its work")
    parser.add_argument(
        "--config", metavar="FILE", default=config.DEFAULT_FILE, help="configuration (default: %(default)s)"
    )
    parser.add_argument(
        "-o", "--output", choices=["text", "json"], default="text", help="json: an array with one object per finding"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Examine the machine; returns 1 when something is broken, 0 when there are warnings at most."""
    from conntrackd.doctor.checks import examine
    from conntrackd.doctor.machine import ERROR, look

    machine = look(args.config, api.socket_path(getattr(args, "socket", None)))
    findings: list[api.Diagnosis] = []
    for finding in examine(machine):
        findings.append(finding)
        if args.output == "text":
            lines = textwrap.wrap(
                finding.message if finding.severity != "ok" else f"{finding.name.replace('_', ' ')}: {finding.message}",
                WIDTH,
                initial_indent=f"{finding.severity:<9}",
                subsequent_indent=" " * 9,
            )
            if finding.advice:
                lines += textwrap.wrap(finding.advice, WIDTH, initial_indent=" " * 7 + "> ", subsequent_indent=" " * 9)
            print("\n".join(lines).replace(finding.severity, paint(finding.severity, COLOURS[finding.severity]), 1))
    if args.output == "json":
        print(msgspec.json.format(msgspec.json.encode(findings)).decode())
    return EXIT_FAILED if any(finding.severity == ERROR for finding in findings) else EXIT_OK
