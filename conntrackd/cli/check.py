"""`conntrackd check`: say everything that is wrong with a configuration, or that nothing is."""

import argparse
import dataclasses
import sys

import msgspec

from conntrackd import api, config
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, EXIT_USAGE


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("check", help="check a configuration file; changes nothing")
    parser.add_argument("file", nargs="?", default=config.DEFAULT_FILE, help="default: %(default)s")
    parser.add_argument("--strict", action="store_true", help="warnings count, too: exit code 1")
    parser.add_argument("--here", action="store_true", help="warn about zones whose interfaces this machine lacks")
    parser.add_argument(
        "-o",
        "--output",
        choices=["text", "json"],
        default="text",
        help="json: an array with one object per error and warning",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Check the file; returns 0 when it can be used, 2 when not, with --strict 1 when there are warnings."""
    from conntrackd.lint import cuts_ssh, lint

    try:
        checked = config.load(args.file)
    except config.ConfigErrors as errors:
        if args.output == "json":
            _print("error", errors.errors)
        else:
            print(errors, file=sys.stderr)
        return EXIT_USAGE
    warnings = lint(checked, args.here)
    cuts = cuts_ssh(checked)
    if args.output == "json":
        _print("warning", warnings)
    else:
        for warning in warnings:
            print(warning.write("warning"), file=sys.stderr)
        zones, rules = len(checked.zones), len(checked.rule)
        print(f"{args.file}: ok, {zones} zone{'s' * (zones != 1)}, {rules} rule{'s' * (rules != 1)}")
    if cuts:
        print(f"warning: {cuts}", file=sys.stderr)
    return EXIT_FAILED if args.strict and (warnings or cuts) else EXIT_OK


def _print(kind: str, found: list[config.ConfigError]) -> None:
    findings = [api.Finding(kind=kind, **dataclasses.asdict(error)) for error in found]
    print(msgspec.json.format(msgspec.json.encode(findings)).decode())
