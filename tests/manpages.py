"""`make man`: write what the man pages say of commands and options anew, from the parsers themselves."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from conntrackd.cli.main import COMMANDS, build_parser

PAGES = Path(__file__).parents[1] / "man"
ABOUT_FLOWS = ("flows", "flow", "count", "kill", "label", "events")
COMMANDS_OF = {
    "conntrackd.8": tuple(name for name in COMMANDS if name not in ABOUT_FLOWS),
    "conntrackd-flows.1": ABOUT_FLOWS,
}
BEGIN, END = '.\\" --- `make man` writes from here\n', '.\\" --- to here\n'


def written(page: str) -> str:
    """The page as it should be."""
    text = (PAGES / page).read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "".join(_commands(COMMANDS_OF[page])) + END + after


def _commands(names: tuple[str, ...]) -> Iterator[str]:
    parser = build_parser(list(COMMANDS))
    choices = _subparsers(parser).choices
    for name in names:
        yield f'.SS "{_escaped(_usage(name, choices[name]))}"\n'
        yield f"{_text(_sentence(choices[name].description or COMMANDS[name]))}\n"
        yield from _arguments(choices[name])


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    words = [name]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words.append(f"{action.metavar} ...")
        elif not action.option_strings and action.help != argparse.SUPPRESS:
            word = str(action.metavar or action.dest).upper()
            words.append({"*": f"[{word}...]", "+": f"{word}...", "?": f"[{word}]"}.get(str(action.nargs), word))
    return " ".join(words)


def _arguments(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, subparser in action.choices.items():
                if name in helps:
                    yield f".TP\n.B {_escaped(prefix + _usage(name, subparser))}\n{_text(helps[name] or '')}\n"
                    yield from _arguments(subparser, f"{prefix}{name} ")
        elif action.option_strings and action.dest not in ("help", "socket") and action.help != argparse.SUPPRESS:
            yield f".TP\n{_option(action, prefix)}\n{_text(_meaning(action))}\n"
        elif not action.option_strings and action.help:
            yield f".TP\n.I {_escaped(str(action.metavar or action.dest).upper())}\n{_text(_meaning(action))}\n"


def _option(action: argparse.Action, prefix: str) -> str:
    value = ""
    if action.nargs != 0:
        value = str(action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper())
        value = f"[{value}]" if action.nargs == "?" else value
    names = ", ".join(f"\\fB{_escaped(name)}\\fR" for name in action.option_strings)
    return _escaped(prefix) + names + (f" \\fI{_escaped(value)}\\fR" if value else "")


def _meaning(action: argparse.Action) -> str:
    if action.metavar == "FILTER":
        return "which connections; see conntrackd-flows(1)" if action.nargs == "*" else "which connections"
    text = (action.help or "").replace("%(default)s", str(action.default))
    text = text.replace("%(choices)s", ", ".join(map(str, action.choices or ())))
    if action.option_strings and action.choices is not None and action.default in action.choices:
        text = f"{text}; {action.default} if it is not given" if text else f"{action.default} if it is not given"
    return text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(text: str) -> str:
    text = _escaped(text)
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", text)
    return text if text.endswith((".", ":")) else f"{text}."


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def _subparsers(parser: argparse.ArgumentParser) -> "argparse._SubParsersAction[argparse.ArgumentParser]":
    (found,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return found


def main() -> None:
    """Write both pages."""
    for page in COMMANDS_OF:
        (PAGES / page).write_text(written(page))


if __name__ == "__main__":
    main()
