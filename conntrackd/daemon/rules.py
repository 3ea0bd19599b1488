"""The iptables and ip6tables rules that bring packets to the queues: our own chains, and one jump to each.

Every chain stands in the table where it changes least for the operator's own rules (an ACCEPT from NFQUEUE
leaves the rest of its table's chain unseen, but no other table):

- raw PREROUTING and OUTPUT, where the kernel's own tracking would stand: all later rules see our mark.
- mangle POSTROUTING, and security INPUT, which runs after filter INPUT: what is dropped there is never
  confirmed. Kernels without a security table get mangle INPUT instead.

Chains are made by `install` and go away with `remove`, never in between: deleting a base chain makes the
kernel drop whatever waits in the queues.
"""

import random
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from conntrackd.config import Config
from conntrackd.const import MARK_CLASS, MARK_UNTRACKED
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.rulescheck import PREFIX, Saved, jumps_to, parse, passing

WAIT_S: Final = 5  # how long iptables may wait for another iptables to let go of its lock
TRIES: Final = 8  # of an installation that others get in the way of,
PAUSE_S: Final = 0.2  # at most so long after one another
IPV6_IS_ON: Final = Path("/proc/net/if_inet6")
OWN_STATUS: Final = Path("/proc/self/status")
CAP_NET_ADMIN: Final = 12


class RulesError(Exception):
    """iptables is missing, refused, or failed; the text is one sentence for the operator."""


@dataclass(frozen=True)
class Chain:
    """One of our chains: its table, the base chain that jumps to it, and its rules without `-A NAME`."""

    name: str
    table: str
    base: str
    rules: list[str]


def plan(config: Config, input_table: str) -> list[Chain]:
    """Lay out the chains that bring packets to the two queues; they are the same for both families."""
    bypass = " --queue-bypass" if config.queue.bypass else ""
    track, confirm = (f"-j NFQUEUE --queue-num {number}{bypass}" for number in config.queue.numbers)
    lo = _comment("loopback is left alone") + "-j RETURN"
    see = _comment("track") + track
    place = Mark(config.queue.mark_mask)
    answers, classes = place.lay[MARK_UNTRACKED], place.lay[MARK_CLASS]
    own = f"-m mark --mark {answers:#x}/{classes:#x} " + _comment("what reject answers") + "-j RETURN"
    defrag = (
        "-m socket --nowildcard "
        + _comment("never reached; its presence makes the kernel reassemble fragments")
        + "-j RETURN"
    )
    why = ("unconfirmed", "not seen yet", "mark overwritten")
    judge = [
        f"-m mark --mark {value:#x}/{mask:#x} {_comment(reason)}{confirm}"
        for (value, mask), reason in zip(place.second_look(), why, strict=True)
    ]
    return [
        Chain(f"{PREFIX}PRE", "raw", "PREROUTING", [f"-i lo {lo}", see, defrag]),
        Chain(f"{PREFIX}OUT", "raw", "OUTPUT", [f"-o lo {lo}", own, see]),
        Chain(f"{PREFIX}POST", "mangle", "POSTROUTING", [f"-o lo {lo}", *judge]),
        Chain(f"{PREFIX}IN", input_table, "INPUT", [f"-i lo {lo}", *judge]),
    ]


def _comment(text: str) -> str:
    return f'-m comment --comment "conntrackd: {text}" '


def families(config: Config) -> dict[str, str]:
    """Map the command of each family that this machine speaks to the family's name; IPv6 may be off."""
    ipv4 = str(config.rules.iptables)
    found = {ipv4: "IPv4"}
    if IPV6_IS_ON.exists():
        found["ip6" + ipv4.removeprefix("ip")] = "IPv6"
    return found


def show(config: Config) -> str:
    """Write what `install` loads on a machine without our rules, as input of iptables-restore --noflush."""
    names = families(config)
    parts = [
        f"# {names[tool]}: {tool}-restore --noflush\n{_filling(chains, {})}" for tool, chains in plans(config).items()
    ]
    return "\n".join(parts)


def plans(config: Config) -> dict[str, list[Chain]]:
    """Lay out the chains for the command of each family of this machine. Raises RulesError."""
    return {tool: plan(config, _input_table(tool)) for tool in families(config)}


def install(wanted: dict[str, list[Chain]]) -> dict[str, Saved]:
    """Load our chains for each command in one run, with one jump to each, in front of what lets packets by.

    Running it again refreshes our chains and nothing else. It looks at what came of it, and begins anew when another
    program got in between. Returns our chains and jumps as iptables-save prints them, for `rulescheck.compare`. Raises
    RulesError; refused rules change nothing.
    """
    loaded = False
    refused: RulesError | None = None
    end_s = time.monotonic() + WAIT_S
    for _ in range(TRIES):
        if refused is not None:  # for good, or because somebody changed the rules at the same moment: not again, then
            if time.monotonic() > end_s:
                break
            time.sleep(random.uniform(0, PAUSE_S))  # noqa: S311
        try:
            found = {tool: parse(listed(tool)) for tool in wanted}
            if loaded and all(_in_place(found[tool], chains) for tool, chains in wanted.items()):
                return {tool: _alone(found[tool], chains) for tool, chains in wanted.items()}
            loaded = False
            loads = {
                tool: _removal(_stale(found[tool], chains), found[tool]) + _filling(chains, found[tool])
                for tool, chains in wanted.items()
            }
            for tool, text in loads.items():
                _restore(tool, text, "--test")
            for tool, text in loads.items():
                _restore(tool, text)
            loaded, refused = True, None
        except RulesError as error:
            refused = error
    raise refused or RulesError("Another program changes the iptables rules again and again: stop it.")


def listed(tool: str) -> str:
    """Ask the kernel for a command's rules, as a text that stays the same while they do. Raises RulesError."""
    done = _run([f"{tool}-save"])
    if done.returncode != 0:
        raise RulesError(_sentence(f"{tool}-save", done.stderr))
    lines = (line for line in done.stdout.splitlines() if not line.startswith("#"))
    return "\n".join(line.rpartition(" ")[0] if line.startswith(":") else line for line in lines)  # without counters


def remove() -> None:
    """Take our chains and every jump to them out of all tables; all else stays. Raises RulesError.

    Both kinds of iptables are looked through and no configuration is asked: this is the way out when it is
    broken.
    """
    found = {tool: parse(listed(tool)) for tool in installed_tools()}
    for tool, here in found.items():
        ours = [place for place in here if place[1].startswith(PREFIX)]
        if ours:
            _restore(tool, _removal(ours, here))


def tried(config: Config, tool: str) -> str:
    """Load our rules in a network namespace that ends with the trial; returns what iptables-save prints there.

    Raises RulesError with what iptables or the kernel says against them.
    """
    text = _filling(plan(config, _input_table(tool)), {})
    done = _run(["unshare", "--net", "sh", "-c", f"{tool}-restore --noflush -w {WAIT_S} && {tool}-save"], text)
    if done.returncode != 0:
        raise RulesError(_sentence(f"{tool}-restore", done.stderr))
    return done.stdout


def installed_tools() -> list[str]:
    """Name the iptables and ip6tables commands of this machine, each kind once."""
    kinds = [kind for kind in ("-legacy", "-nft") if shutil.which(f"iptables{kind}-save")] or [""]
    return [f"{family}{kind}" for kind in kinds for family in ("iptables", "ip6tables")]


def _input_table(tool: str) -> str:
    """Find the table for INPUT: security, or mangle where the kernel has no security table."""
    done = _run([tool, "-w", str(WAIT_S), "-t", "security", "-n", "-L", "INPUT"])
    return "mangle" if done.returncode != 0 and "does not exist" in done.stderr else "security"


def _in_place(here: Saved, chains: list[Chain]) -> bool:
    """Whether our chains are filled, each with one jump at its place, and no chain of another version is left."""
    return not _stale(here, chains) and all(
        len(here.get((chain.table, chain.name), ())) == len(chain.rules) and not _jumping(chain, here)
        for chain in chains
    )


def _alone(here: Saved, chains: list[Chain]) -> Saved:
    """Take from a listing what is ours: the chains, and for each the base chain with nothing but the jump to it."""
    ours = {(chain.table, chain.name): here[chain.table, chain.name] for chain in chains}
    return ours | {
        (chain.table, base): [jump] for chain in chains for base, jump in jumps_to(here, chain.table, chain.name)
    }


def _stale(here: Saved, chains: list[Chain]) -> list[tuple[str, str]]:
    """Find chains of ours in a table where the plan has none: from another version or another kernel."""
    places = {(chain.table, chain.name) for chain in chains}
    return [place for place in here if place[1].startswith(PREFIX) and place not in places]


def _filling(chains: list[Chain], here: Saved) -> str:
    """Write input for iptables-restore that fills the chains anew and brings the jumps to their places."""
    lines = []
    for table in dict.fromkeys(chain.table for chain in chains):
        inside = [chain for chain in chains if chain.table == table]
        lines.append(f"*{table}")
        # Naming a chain of one's own empties it, or makes it: that is what makes a second install harmless.
        lines += [f":{chain.name} - [0:0]" for chain in inside]
        lines += [f"-A {chain.name} {rule}" for chain in inside for rule in chain.rules]
        lines += [line for chain in inside for line in _jumping(chain, here)]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def _jumping(chain: Chain, here: Saved) -> list[str]:
    """Write what leaves one jump to the chain: behind rules of others, as our ACCEPT would take them away, but in front
    of those that let packets by. Empty if it is so.
    """
    jump = f"{_comment('connection tracking')}-j {chain.name}"
    rules = here.get((chain.table, chain.base), [])
    jumps = jumps_to(here, chain.table, chain.name)
    if jumps == [(chain.base, jump)] and not passing(here, chain.table, rules[: rules.index(jump)]):
        return []
    others = [rule for rule in rules if PREFIX not in rule]
    by = passing(here, chain.table, others)
    place = f"-I {chain.base} {others.index(by[0]) + 1}" if by else f"-A {chain.base}"
    return [*(f"-D {at} {rule}" for at, rule in jumps), f"{place} {jump}"]


def _removal(ours: list[tuple[str, str]], here: Saved) -> str:
    """Write input for iptables-restore that deletes these chains and the jumps to them; empty for none."""
    lines = []
    # The confirming side goes first: a packet that only the tracking side saw is a smaller matter than one
    # that arrives unseen at the confirming side.
    for table in sorted({table for table, _ in ours}, key=lambda name: name == "raw"):
        names = [name for at, name in ours if at == table]
        lines.append(f"*{table}")
        lines += [f"-D {at} {rule}" for name in names for at, rule in jumps_to(here, table, name)]
        lines += [f"-F {name}" for name in names]
        lines += [f"-X {name}" for name in names]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n" if lines else ""


def _restore(tool: str, text: str, *options: str) -> None:
    command = [f"{tool}-restore", "--noflush", "-w", str(WAIT_S), *options]
    done = _run(command, text)
    if done.returncode != 0:
        raise RulesError(_sentence(command[0], done.stderr))


def _sentence(command: str, stderr: str) -> str:
    """Make one sentence from what iptables printed; its hints to upgrade or to read the help are left out."""
    if not may_administer():
        return f"{command} needs root (the capability CAP_NET_ADMIN)."
    lines = [line.strip() for line in stderr.splitlines()]
    said = [line for line in lines if line and not line.startswith(("#", "Perhaps"))]
    return f"{command} failed: {said[0].rstrip('.') if said else 'it gave no reason'}."


def may_administer() -> bool:
    """Look at our own capabilities: what iptables prints without them differs from version to version."""
    found = re.search(r"^CapEff:\s*(\w+)$", OWN_STATUS.read_text(), re.MULTILINE)
    return found is None or bool(int(found[1], 16) >> CAP_NET_ADMIN & 1)


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise RulesError(f"{command[0]} is not on the PATH: install the Debian package iptables.")
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=WAIT_S * 3, check=False)
    except subprocess.TimeoutExpired:
        raise RulesError(f"{command[0]} gave no answer within {WAIT_S * 3} seconds.") from None
    except OSError as error:
        raise RulesError(f"{command[0]} could not be started: {error.strerror}.") from None
