"""`conntrackd run`: the daemon itself, in the foreground."""

import argparse

from conntrackd import api, config


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("run", help="run the daemon in the foreground")
    parser.add_argument(
        "--config", metavar="FILE", default=config.DEFAULT_FILE, help="configuration (default: %(default)s)"
    )
    parser.add_argument("--simulate", metavar="FAILURE", help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # how a restart tries itself out
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run until told to stop; returns the exit code."""
    from conntrackd.daemon import main

    return main.run(args.config, api.socket_path(getattr(args, "socket", None)), args.simulate, args.rehearse)
