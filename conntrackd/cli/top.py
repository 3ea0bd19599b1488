"""`conntrackd top`: the connections that lead, on a screen that keeps itself up to date."""

import argparse

from conntrackd import api
from conntrackd.cli.filterwords import add_filter, filter_of
from conntrackd.cli.output import EXIT_FAILED, EXIT_OK, remark
from conntrackd.cli.times import seconds


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("top", help="watch the connections that lead by rate, bytes or age; end some")
    add_filter(parser)
    parser.add_argument("--by", choices=["flow", "src", "dst", "zone", "rule"], default="flow", help="in groups")
    parser.add_argument("--sort", choices=["rate", "bytes", "packets", "age", "flows"], default="rate")
    parser.add_argument("--every", metavar="TIME", type=seconds, default=1.0, help="as 1s (the default) or 500ms")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Show it until the operator leaves; returns the exit code."""
    path, text = api.socket_path(getattr(args, "socket", None)), filter_of(args)
    for _ in api.request(path, "top", {"limit": 1}):
        pass  # a daemon that is not there is told of before the screen changes
    try:
        from conntrackd.cli.topscreen import TopScreen
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "textual":
            raise
        remark(
            "conntrackd top draws its screen with the library textual, which is not installed: "
            "pip install 'conntrackd[top]'. `conntrackd flows --sort bytes --watch` does without."
        )
        return EXIT_FAILED
    TopScreen(path, text, args.by, args.sort, max(0.1, args.every)).run()
    return EXIT_OK
