"""The iptables and ip6tables rules that bring packets to the queues: our own chains, and one jump to each.

Every chain stands in the table where it changes least for the operator's own rules (an ACCEPT from NFQUEUE
leaves the rest of its table's chain unseen, but no other table):

- raw PREROUTING and OUTPUT, where the kernel's own tracking would stand: all later rules see our mark.
- mangle POSTROUTING, and security INPUT, which runs after filter INPUT: what is dropped there is never
  confirmed. Kernels without a security table get mangle INPUT instead.

Chains are made by `install` and go away with `remove`, never in between: deleting a base chain makes the
kernel drop whatever waits in the queues.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from conntrackd.config import Config
from conntrackd.const import MARK_CLASS, MARK_UNTRACKED
from conntrackd.daemon.mark import Mark

PREFIX: Final = "CONNTRACKD-"
WAIT_S: Final = 10  # how long iptables may wait for another iptables to let go of its lock
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
    parts = [
        f"# {name}: {tool}-restore --noflush\n" + _filling(plan(config, _input_table(tool)), {})
        for tool, name in families(config).items()
    ]
    return "\n".join(parts)


def install(config: Config) -> None:
    """Load our chains for both families, each in one run, and jump to them where nothing does yet.

    Running it again refreshes our chains and nothing else. Raises RulesError; refused rules change nothing.
    """
    loads = {}
    for tool in families(config):
        chains = plan(config, _input_table(tool))
        ours = _ours(tool)
        # A chain of ours in a table where the plan has none is from another version or another kernel.
        places = {(chain.table, chain.name) for chain in chains}
        stale = {place: jumps for place, jumps in ours.items() if place not in places}
        loads[tool] = _removal(stale) + _filling(chains, ours)
    for tool, text in loads.items():
        _restore(tool, text, "--test")
    for tool, text in loads.items():
        _restore(tool, text)


def remove() -> None:
    """Take our chains and every jump to them out of all tables; all else stays. Raises RulesError.

    Both kinds of iptables are looked through and no configuration is asked: this is the way out when it is
    broken.
    """
    found = {tool: _ours(tool) for tool in installed_tools()}
    for tool, ours in found.items():
        if ours:
            _restore(tool, _removal(ours))


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


def _ours(tool: str) -> dict[tuple[str, str], list[str]]:
    """Find our chains by (table, name), each with all rules that jump to it, as `-A ...`."""
    done = _run([f"{tool}-save"])
    if done.returncode != 0:
        raise RulesError(_sentence(f"{tool}-save", done.stderr))
    found: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in done.stdout.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(f":{PREFIX}"):
            found[table, line[1:].split()[0]] = []
        elif jump := re.search(rf"^-A .* -[jg] ({PREFIX}\S+)$", line):
            found[table, jump[1]].append(line)
    return found


def _filling(chains: list[Chain], ours: dict[tuple[str, str], list[str]]) -> str:
    """Write input for iptables-restore that fills the chains anew and adds the jumps that `ours` lacks."""
    lines = []
    for table in dict.fromkeys(chain.table for chain in chains):
        here = [chain for chain in chains if chain.table == table]
        lines.append(f"*{table}")
        # Naming a chain of one's own empties it, or makes it: that is what makes a second install harmless.
        lines += [f":{chain.name} - [0:0]" for chain in here]
        lines += [f"-A {chain.name} {rule}" for chain in here for rule in chain.rules]
        lines += [
            f"-A {chain.base} {_comment('connection tracking')}-j {chain.name}"
            for chain in here
            if not ours.get((table, chain.name))
        ]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def _removal(ours: dict[tuple[str, str], list[str]]) -> str:
    """Write input for iptables-restore that deletes these chains and the jumps to them; empty for none."""
    lines = []
    # The confirming side goes first: a packet that only the tracking side saw is a smaller matter than one
    # that arrives unseen at the confirming side.
    for table in sorted({table for table, _ in ours}, key=lambda name: name == "raw"):
        here = {name: jumps for (at, name), jumps in ours.items() if at == table}
        lines.append(f"*{table}")
        lines += ["-D" + jump.removeprefix("-A") for jumps in here.values() for jump in jumps]
        lines += [f"-F {name}" for name in here]
        lines += [f"-X {name}" for name in here]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n" if lines else ""


def _restore(tool: str, text: str, *options: str) -> None:
    command = [f"{tool}-restore", "--noflush", "-w", str(WAIT_S), *options]
    done = _run(command, text)
    if done.returncode != 0:
        raise RulesError(_sentence(command[0], done.stderr))


def _sentence(command: str, stderr: str) -> str:
    """Make one sentence from what iptables printed; its hints to upgrade or to read the help are left out."""
    if not _may_administer():
        return f"{command} needs root (the capability CAP_NET_ADMIN)."
    lines = [line.strip() for line in stderr.splitlines()]
    said = [line for line in lines if line and not line.startswith(("#", "Perhaps"))]
    return f"{command} failed: {said[0].rstrip('.') if said else 'it gave no reason'}."


def _may_administer() -> bool:
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
