"""What the checks look at: the configuration, the daemon if it runs, and the rules of this network namespace."""

import json
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from conntrackd import api
from conntrackd import config as config_file
from conntrackd.config import Config, ConfigErrors
from conntrackd.daemon import rules
from conntrackd.daemon.rulescheck import PREFIX, Saved, parse

OK: Final = "ok"
WARNING: Final = "warning"
ERROR: Final = "error"
WAIT_S: Final = 30


@dataclass
class Machine:
    """Facts that more than one check needs. What could not be found out is empty."""

    config: Config  # the defaults, if the file cannot be used
    config_path: str
    config_errors: ConfigErrors | None = None
    status: api.Status | None = None
    in_force: list[str] = field(default_factory=list)  # texts of the configuration that the daemon has in force
    unreachable: str = ""  # why the daemon, which is there, does not say what it does
    blind: bool = False  # we may not see the rules
    elsewhere: bool = False  # the daemon is in another network namespace than we
    saved: dict[str, Saved] = field(default_factory=dict)  # by iptables command
    wanted: dict[str, Saved] = field(default_factory=dict)  # as it would be on a machine with our rules alone
    refused: dict[str, str] = field(default_factory=dict)  # why the kernel or iptables does not take our rules
    nft: str = ""
    ip_rules: list[dict[str, Any]] = field(default_factory=list)

    def ours(self, tool: str) -> list[str]:
        """Name the command's chains that are ours."""
        return [chain for _, chain in self.saved.get(tool, {}) if chain.startswith(PREFIX)]

    def others(self) -> list[tuple[str, str, str, str]]:
        """List all rules of iptables that are not ours: command, table, chain, rule."""
        return [
            (tool, table, chain, rule)
            for tool, saved in self.saved.items()
            for (table, chain), lines in saved.items()
            for rule in lines
            if not chain.startswith(PREFIX) and PREFIX not in rule
        ]


def look(config_path: str, socket: str) -> Machine:
    """Find the facts out."""
    try:
        machine = Machine(config_file.load(config_path), config_path)
    except ConfigErrors as errors:
        machine = Machine(config_file.parse(b"version = 1\n", "defaults"), config_path, errors)
    try:
        (row,) = api.request(socket, "status")
        machine.status = msgspec.json.decode(row, type=api.Status)
        texts = [msgspec.json.decode(row, type=api.SourceText) for row in api.request(socket, "config")]
        machine.in_force = [text.text for text in texts]
    except api.DaemonNotRunningError:
        pass
    except (api.RequestError, ValueError) as error:
        machine.unreachable = str(error)
    machine.blind = not rules.may_administer()
    if machine.status is not None:
        with suppress(OSError):
            here, there = (os.stat(f"/proc/{pid}/ns/net") for pid in ("self", machine.status.pid))
            machine.elsewhere = here.st_ino != there.st_ino
    for tool in {**dict.fromkeys(rules.installed_tools()), **rules.families(machine.config)}:
        done = command(f"{tool}-save")
        if done is not None:
            machine.saved[tool] = parse(done)
    for tool in rules.families(machine.config):
        try:
            machine.wanted[tool] = parse(rules.tried(machine.config, tool))
        except rules.RulesError as error:
            machine.refused[tool] = str(error)
    machine.nft = command("nft", "list", "ruleset") or ""
    for family in ("-4", "-6"):
        machine.ip_rules += json.loads(command("ip", "-j", family, "rule") or "[]")
    return machine


def command(*words: str) -> str | None:
    """Run a command that only looks; None if it is not there or fails."""
    if shutil.which(words[0]) is None:
        return None
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None


def number(path: str) -> int | None:
    """Read a number out of /proc or /sys; None if it is not there."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
