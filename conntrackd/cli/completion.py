"""`conntrackd completion`: what a shell asks when the operator presses Tab.

The scripts that the shells load know nothing of the command line: they ask `conntrackd completion words` each time,
which looks at the parsers themselves and, for names that only the daemon knows, asks the daemon.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec

from conntrackd import api
from conntrackd.cli.output import EXIT_OK, endpoint

FILES = ":files"  # in place of words: names of files
ROWS_MAX = 500  # of an answer of the daemon: nobody reads more
TIMEOUT_S = 2.0  # the operator waits at the keyboard

SCRIPTS = {
    "bash": r"""# In ~/.bashrc: source <(conntrackd completion bash)
_conntrackd() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        if [[ $line == :files ]]; then
            compopt -o default
        else
            COMPREPLY+=("${line%%$'\t'*}")
        fi
    done < <("$1" completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _conntrackd conntrackd
""",
    "zsh": r"""#compdef conntrackd
# In ~/.zshrc, after compinit: source <(conntrackd completion zsh)
_conntrackd() {
    local line
    local -a found
    for line in "${(@f)$(${words[1]} completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        if [[ $line == :files ]]; then
            _files
            return
        elif [[ -n $line ]]; then
            line=${line//:/\\:}
            found+=("${line/$'\t'/:}")
        fi
    done
    _describe conntrackd found
}
compdef _conntrackd conntrackd
""",
    "fish": r"""# conntrackd completion fish > ~/.config/fish/completions/conntrackd.fish
function __conntrackd_words
    set -l words (commandline -opc)
    set -l found ($words[1] completion words -- $words[2..-1] "$(commandline -ct)" 2>/dev/null)
    if test "$found[1]" = :files
        __fish_complete_path (commandline -ct)
    else
        printf '%s\n' $found
    end
end
complete -c conntrackd -f -a '(__conntrackd_words)'
""",
}

Words = Iterable[tuple[str, str]]  # each with what it means


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "completion",
        help="print the script by which bash, zsh or fish completes this command line",
        description="Bash: source <(conntrackd completion bash); zsh the same, after compinit; "
        "fish: conntrackd completion fish > ~/.config/fish/completions/conntrackd.fish",
    )
    shells = parser.add_subparsers(dest="shell", metavar="SHELL", required=True)
    for shell in SCRIPTS:
        shells.add_parser(shell, help=f"for {shell}")
    words = shells.add_parser("words")  # for the scripts; without help nobody is told of it
    words.add_argument("words", nargs="*", metavar="WORD")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the script, or the words; returns the exit code."""
    if args.shell in SCRIPTS:
        print(SCRIPTS[args.shell], end="")
        return EXIT_OK
    for word, meaning in complete(args.words or [""]):
        print(f"{word}\t{meaning}" if meaning else word)
    return EXIT_OK


def complete(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Say what may stand in place of the last word, in view of those before it."""
    from conntrackd.cli.main import build_parser

    *before, current = words
    parser = build_parser(before)
    option: argparse.Action | None = None  # whose value comes next
    socket, places = None, 0
    for word in before:
        subparsers = _subparsers(parser)
        if option is not None and not (option.nargs == "?" and word.startswith("-")):
            socket = word if option.dest == "socket" else socket
            option = None
        elif word.startswith("-"):
            found = parser._option_string_actions.get(word)
            option = found if found is not None and found.nargs != 0 else None
        elif subparsers is not None and word in subparsers.choices:
            parser, places = subparsers.choices[word], 0
        else:
            places += 1
    if current.startswith("-") and (option is None or option.nargs == "?"):
        options: Words = _options(parser)
    else:
        action = option or _place(parser, places)
        options = [] if action is None else _values(action, Asker(socket), before)
    return ((word, meaning) for word, meaning in options if word.startswith(current) or word == FILES)


def _subparsers(parser: argparse.ArgumentParser) -> "argparse._SubParsersAction[Any] | None":
    return next((each for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)


def _options(parser: argparse.ArgumentParser) -> Words:
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            yield action.option_strings[-1], _meaning(action)


def _place(parser: argparse.ArgumentParser, number: int) -> argparse.Action | None:
    """Find the argument that stands at a place; the last may take any number."""
    places = parser._get_positional_actions()
    if number < len(places):
        return places[number]
    return places[-1] if places and places[-1].nargs in ("*", "+") else None


def _values(action: argparse.Action, daemon: "Asker", before: Sequence[str]) -> Words:
    if isinstance(action, argparse._SubParsersAction):
        return [(choice.dest, choice.help or "") for choice in action._choices_actions]
    if action.choices is not None:
        return [(str(choice), "") for choice in action.choices]
    if action.metavar in ("FILE", "PATH", "DIR") or action.dest == "file":
        return [(FILES, "")]
    live = LIVE.get(action.dest)
    return [] if live is None else live(daemon, before)


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return " ".join(text.replace("%(choices)s", ", ".join(map(str, action.choices or ()))).split())


# --- What the daemon knows ------------------------------------------------------------------------------------------


class Asker:
    """Asks the daemon, which may not be there: then there are no words."""

    def __init__(self, socket: str | None) -> None:
        self._path = api.socket_path(socket)

    def rows(self, command: str, args: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Give the first rows of an answer."""
        try:
            for row in islice(api.request(self._path, command, args, TIMEOUT_S), ROWS_MAX):
                yield msgspec.json.decode(row)
        except (api.DaemonNotRunningError, api.RequestError):
            return


def _rules(daemon: Asker, _before: Sequence[str]) -> Words:
    return [(row["name"], row["action"]) for row in daemon.rows("rules")]


def _sets(daemon: Asker, _before: Sequence[str]) -> Words:
    rows = daemon.rows("set", {"action": "list", "name": ""})
    return [(row["name"], f"{row['configured'] + row['added']} entries") for row in rows]


def _labels(daemon: Asker, _before: Sequence[str]) -> Words:
    return [(row["name"], f"bit {row['bit']}") for row in daemon.rows("label", {"action": "list"})]


def _generations(daemon: Asker, _before: Sequence[str]) -> Words:
    return [(str(row["generation"]), f"{row['how']} by {row['who']}, {row['time']}") for row in daemon.rows("history")]


def _flows(daemon: Asker, _before: Sequence[str]) -> Words:
    for row in daemon.rows("flows"):
        orig = row["orig"]
        ends = f"{endpoint(orig['src'], orig.get('sport'))} > {endpoint(orig['dst'], orig.get('dport'))}"
        yield str(row["id"]), f"{row['protocol']} {ends}"


def _interfaces(daemon: Asker, _before: Sequence[str]) -> Words:
    for status in daemon.rows("status"):
        yield "self", "the router itself"
        for link in status["interfaces"]:
            yield link["name"], f"zone {link['zone']}" if link["zone"] else ""


def _zones(daemon: Asker, _before: Sequence[str]) -> Words:
    return [(str(zone), "") for zone in sorted({row["zone"] for row in daemon.rows("flows")})]


def _states(_daemon: Asker, _before: Sequence[str]) -> Words:
    from conntrackd.core.proto.tcp_states import STATE_NAMES

    return [(name, "") for name in STATE_NAMES]


def _helpers(_daemon: Asker, _before: Sequence[str]) -> Words:
    from conntrackd.core.helpers import HELPERS

    return [(name, "") for name in sorted(HELPERS)]


def _filter(daemon: Asker, before: Sequence[str]) -> Words:
    """Complete a filter: a name behind a word that wants one, else a word of the language."""
    from conntrackd.filter import WORDS

    named = IN_FILTER.get(before[-1] if before else "")
    return named(daemon, before) if named is not None else [(word, "") for word in (*WORDS, "and", "or")]


Live = Callable[[Asker, Sequence[str]], Words]
IN_FILTER: dict[str, Live] = {
    "rule": _rules, "state": _states, "in": _interfaces, "out": _interfaces, "id": _flows, "zone": _zones,
    "helper": _helpers, "label": _labels,
}  # fmt: skip
# By the name of the argument.
LIVE: dict[str, Live] = {
    "filter": _filter, "name": _sets, "generation": _generations, "id": _flows, "state": _states, "zone": _zones,
    "label": _labels,
}  # fmt: skip
