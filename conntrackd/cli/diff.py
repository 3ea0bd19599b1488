"""`conntrackd diff`: what a configuration file would change about the policy in force."""

import argparse
import bisect
import json
from collections.abc import Iterator
from typing import Any

import msgspec

from conntrackd import api, config
from conntrackd.cli.output import EXIT_OK, EXIT_USAGE, remark
from conntrackd.configfiles import Files, SourceFile, read


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser("diff", help="show what a configuration file would change; changes nothing")
    parser.add_argument("file", nargs="?", default=config.DEFAULT_FILE, help="default: %(default)s")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Show it, or nothing if nothing would change; returns the exit code."""
    try:
        files = read(args.file)
        config.check(files)
    except config.ConfigErrors as errors:
        remark(str(errors))
        return EXIT_USAGE
    rows = api.request(api.socket_path(getattr(args, "socket", None)), "config")
    running = [msgspec.json.decode(row, type=api.SourceText) for row in rows]
    before = Files([SourceFile(file.name, file.text.encode()) for file in running]).data
    for line in differences(before, Files(files).data):
        print(line)
    return EXIT_OK


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Write the differences of two configurations: `+` what is new, `-` what goes, `~` what changes, `>` what moves."""
    old_rules = {rule["name"]: rule for rule in before.pop("rule", [])}
    new_rules = {rule["name"]: rule for rule in after.pop("rule", [])}
    yield from _tables(before, after, "")
    for name, rule in old_rules.items():
        if name not in new_rules:
            yield f"- rule {name}: {_written(rule)}"
    kept = [name for name in old_rules if name in new_rules]
    order = [name for name in new_rules if name in old_rules]
    stay = _longest_common(kept, order)
    previous = ""
    for name, rule in new_rules.items():
        place = f"after {previous}" if previous else "at the top"
        previous = name
        if name not in old_rules:
            yield f"+ rule {name} ({place}): {_written(rule)}"
            continue
        if name not in stay:
            yield f"> rule {name}: moves {place}"
        yield from _tables(old_rules[name], rule, f"rule {name}: ")


def _tables(before: dict[str, Any], after: dict[str, Any], where: str) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _tables(old, new, f"{where}{key}.")
        elif old is None:
            yield f"+ {where}{key} = {_written(new)}"
        elif new is None:
            yield f"- {where}{key} = {_written(old)}"
        else:
            yield f"~ {where}{key} = {_written(old)} -> {_written(new)}"


def _written(value: Any) -> str:
    """Write a value on one line, as TOML does for what a configuration has."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_written(entry)}" for key, entry in value.items() if key != "name") + " }"
    return json.dumps(value, ensure_ascii=False, default=str)


def _longest_common(one: list[str], other: list[str]) -> set[str]:
    """Choose what keeps its order in both: the longest ascending run of places (patience sorting)."""
    place = {name: index for index, name in enumerate(other)}
    tails: list[int] = []
    before: dict[int, int] = {}
    for name in one:
        at = bisect.bisect_left(tails, place[name])
        if at:
            before[place[name]] = tails[at - 1]
        tails[at : at + 1] = [place[name]]
    kept = set()
    last = tails[-1] if tails else -1
    while last >= 0:
        kept.add(other[last])
        last = before.get(last, -1)
    return kept
