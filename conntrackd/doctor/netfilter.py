"""Checks of the rules: ours, in the right places and order, and what those of others do to our packets."""

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from conntrackd.api import Diagnosis
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.queue import kernel_queues, process
from conntrackd.daemon.rules import families
from conntrackd.daemon.rulescheck import PREFIX, compare, quoted
from conntrackd.doctor.machine import ERROR, WARNING, Machine, number

INSTALL: Final = "Run `conntrackd rules install`."
ALL: Final = 0xFFFFFFFF

TRACKS: Final = re.compile(
    r"-m (conntrack|state|connmark|connlimit|connbytes|helper)\b"
    r"|-j (CONNMARK|MASQUERADE|SNAT|DNAT|REDIRECT|NETMAP|SYNPROXY)\b"
)
NFT_TRACKS: Final = re.compile(
    r"^\s*(?:type nat hook \w+|.*\bct (?:state|mark|status|count|label|helper|zone)\b.*)", re.M
)
# Chains by which other firewalls are known.
CHAINS: Final = {
    "ufw": r"ufw6?-",
    "firewalld": r"(IN|FWD|FWDI|FWDO)_\w+|(INPUT|FORWARD)_direct",
    "Docker": r"DOCKER",
    "shorewall": r"shorewall|dynamic$",
    "Kubernetes": r"KUBE-",
    "libvirt": r"LIBVIRT_",
}
IPTABLES_TABLES: Final = ("raw", "mangle", "nat", "filter", "security")


def kernel(machine: Machine) -> Iterator[Diagnosis]:
    """Whether kernel and iptables take our rules, which are tried in a namespace of their own."""
    for tool, sentence in machine.refused.items():
        yield Diagnosis(
            "kernel_refuses_rules", ERROR, f"{tool} does not take conntrackd's rules here. {sentence}",
            "The kernel needs nfnetlink_queue and the matches and targets mark, comment, socket and NFQUEUE "
            "(xt_mark, xt_comment, xt_socket, xt_NFQUEUE); or set rules.iptables to another kind.",
        )  # fmt: skip


def in_place(machine: Machine) -> Iterator[Diagnosis]:
    """Whether our rules are there as the configuration wants them, for both families, and nothing goes around them."""
    found: list[Diagnosis] = []
    places = 0
    for tool in families(machine.config):
        here, wanted = machine.saved.get(tool, {}), machine.wanted.get(tool, {})
        places += sum(place in here for place in wanted if place[1].startswith(PREFIX))
        found += [
            Diagnosis(each.name, WARNING if each.mild else ERROR, each.text, INSTALL)
            for each in compare(tool, here, wanted)
        ]
    for tool in machine.saved:
        if tool not in families(machine.config) and machine.ours(tool):
            found.append(
                Diagnosis(
                    "rules_twice", ERROR, f"{tool} has rules of conntrackd, too: packets are queued twice.",
                    "Run `conntrackd rules remove`, which looks through both kinds, and `conntrackd rules install`.",
                )
            )  # fmt: skip
    if machine.status is None and places and not machine.unreachable and not machine.config.queue.bypass:
        found.append(
            Diagnosis(
                "rules_without_daemon", ERROR,
                "The rules are in place and the daemon does not run: every new packet is dropped.",
                "Start the daemon, or run `conntrackd rules remove`.",
            )
        )  # fmt: skip
    if machine.status is None and not places and all(each.name == "rules_missing" for each in found):
        # The daemon installs them itself when it starts.
        found = [msgspec.structs.replace(each, severity=WARNING) for each in found]
    yield from found


def queues(machine: Machine) -> Iterator[Diagnosis]:
    """Whether the queues are ours alone."""
    held = kernel_queues()
    for queue in machine.config.queue.numbers:
        if machine.status is None and queue in held and not machine.unreachable:
            yield Diagnosis(
                "queue_held", ERROR,
                f"Queue {queue} is held by {process(held[queue].portid)}, which is not our daemon.",
                "Stop it, or set other queue.numbers.",
            )  # fmt: skip
        if machine.status is not None and queue not in held:
            yield Diagnosis(
                "queue_not_bound", ERROR, f"The daemon runs, and queue {queue} is not bound.",
                "Restart the daemon: the configuration names other queues than it was started with.",
            )  # fmt: skip
    for tool, table, chain, rule in machine.others():
        for found in re.finditer(r"--queue-(?:num|balance) (\d+)(?::(\d+))?", rule):
            first, last = int(found[1]), int(found[2] or found[1])
            if any(first <= queue <= last for queue in machine.config.queue.numbers):
                yield Diagnosis(
                    "queue_shared", ERROR,
                    f"A rule of others sends packets to our queue: {tool} {table} {chain} {rule}.",
                    "Give that program, or queue.numbers, another number.",
                )  # fmt: skip


def marks(machine: Machine) -> Iterator[Diagnosis]:
    """Whether others write our bits of the packet mark, or want them to be 0."""
    ours = Mark(machine.config.queue.mark_mask).ours
    written, read = [], []
    for tool, table, chain, rule in machine.others():
        where = f"{tool} {table} {chain} {rule}"
        for found in re.finditer(r"--set-x?mark (0x\w+)(?:/(0x\w+))?", rule):
            if "-j MARK" in rule and int(found[2] or "0xffffffff", 16) & ours:
                written.append(where)
        if "--restore-mark" in rule:
            masked = re.search(r"--nfmask (0x\w+)", rule)
            if (int(masked[1], 16) if masked else ALL) & ours:
                written.append(where)
        for found in re.finditer(r"-m mark (?:! )?--mark (0x\w+)(?:/(0x\w+))?", rule):
            if int(found[2] or "0xffffffff", 16) & ours == ours and int(found[2] or "0xffffffff", 16) != ours:
                read.append(where)
    for found in re.finditer(r"meta mark set ([^\n]*)", machine.nft):
        if _nft_writes(found[1]) & ours:
            written.append(f"nft {found[0].strip()}")
    if written:
        yield Diagnosis(
            "mark_written", WARNING,
            f"Rules of others write bits of the mark that are ours ({ours:#x}): {quoted(written)}.",
            f"Let them use a mask without these bits (`--set-xmark VALUE/{ALL & ~ours:#x}`), or set queue.mark_mask.",
        )  # fmt: skip
    if read:
        yield Diagnosis(
            "mark_read", WARNING,
            f"Rules of others compare the whole mark, in which our bits ({ours:#x}) are set: {quoted(read)}.",
            f"Let them compare their own bits only: `--mark VALUE/{ALL & ~ours:#x}`.",
        )  # fmt: skip
    for entry in machine.ip_rules:
        if "fwmark" in entry and int(str(entry.get("fwmask", "0xffffffff")), 16) & ours:
            mask = f"{entry['fwmark']}/{ALL & ~ours:#x}"
            yield Diagnosis(
                "mark_routed", ERROR,
                f"The routing rule {entry['priority']} compares our bits ({ours:#x}) of the mark {entry['fwmark']}, "
                "and so never matches a packet that conntrackd has seen.",
                f"Write it with a mask: `ip rule add fwmark {mask} ...`.",
            )  # fmt: skip


def _nft_writes(expression: str) -> int:
    """Say which bits a `meta mark set` changes, as nft prints it; all, if that can't be read."""
    kept = re.match(r"(?:meta )?mark (?:& (0x\w+))?(?: ?[|^] ?)?(0x\w+)?", expression)
    if kept is None or "meta mark" not in expression:
        return ALL
    return ALL & ~int(kept[1] or "0xffffffff", 16) | int(kept[2] or "0", 16)


def others(machine: Machine) -> Iterator[Diagnosis]:
    """Other firewalls that judge packets in this namespace."""
    chains = {chain for _, saved in machine.saved.items() for _, chain in saved}
    for name, pattern in CHAINS.items():
        if any(re.match(pattern, chain) for chain in chains):
            yield Diagnosis(
                "other_firewall", WARNING, f"{name} has iptables rules here and judges packets, too.",
                f"Let one firewall do the work: stop {name}, or know that both must let a packet pass.",
            )  # fmt: skip
    for found in re.finditer(r"^table (\w+) (\S+) \{(.*?)^\}", machine.nft, re.M | re.S):
        family, name, body = found[1], found[2], found[3]
        if " hook " in body and not (family in ("ip", "ip6") and name in IPTABLES_TABLES):
            yield Diagnosis(
                "other_firewall", WARNING, f"The nftables table {family} {name} judges packets, too.",
                "Let one firewall do the work, or know that both must let a packet pass.",
            )  # fmt: skip


def kernel_conntrack(machine: Machine) -> Iterator[Diagnosis]:
    """Whether the kernel's own tracker is at work."""
    reasons = [f"{tool} {table} {chain} {rule}" for tool, table, chain, rule in machine.others() if TRACKS.search(rule)]
    reasons += [f"nft {found[0].strip()}" for found in NFT_TRACKS.finditer(machine.nft)]
    count = number("/proc/sys/net/netfilter/nf_conntrack_count") or 0
    if reasons or count:
        because = f", because of {quoted(reasons)}" if reasons else ""
        yield Diagnosis(
            "kernel_conntrack", WARNING, f"The kernel tracks connections here, too ({count} now){because}.",
            "NAT needs that. Where it is not needed, take those rules out: every packet is tracked twice.",
        )  # fmt: skip
