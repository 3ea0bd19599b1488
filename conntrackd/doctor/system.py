"""Checks of all that is not rules: configuration, daemon, capabilities, memory, routing, other programs, clock."""

import importlib.util
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import conntrackd
from conntrackd.api import Diagnosis
from conntrackd.daemon.queue import wanted_buffer
from conntrackd.doctor.machine import ERROR, WARNING, Machine, command, number
from conntrackd.lint import empty_zones

CAPABILITIES: Final = {12: "CAP_NET_ADMIN", 13: "CAP_NET_RAW"}
SO_RCVBUFFORCE: Final = 33
SLOW_CLOCKS: Final = ("hpet", "acpi_pm", "jiffies")
CLOCK: Final = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
OTHER_CONF: Final = Path("/etc/conntrackd/conntrackd.conf")


def configuration(machine: Machine) -> Iterator[Diagnosis]:
    """Whether the configuration can be used, and is the one in force."""
    errors = machine.config_errors
    if errors is not None:
        count, first = len(errors.errors), str(errors.errors[0]).splitlines()[0]
        yield Diagnosis(
            "config_invalid", ERROR, f"The configuration cannot be used ({count} mistake{'s' * (count > 1)}): {first}",
            f"`conntrackd check {machine.config_path}` shows all of them.",
        )  # fmt: skip
        return
    on_disk = [file.text.decode() for file in machine.config.files().files]
    if machine.in_force and machine.in_force != on_disk:
        yield Diagnosis(
            "config_not_in_force", WARNING, f"{machine.config_path} is not what the daemon has in force.",
            f"`conntrackd diff {machine.config_path}` shows the difference, `conntrackd reload` puts it in force.",
        )  # fmt: skip
    if machine.config.metrics.listen and importlib.util.find_spec("prometheus_client") is None:
        yield Diagnosis(
            "metrics_package", ERROR, "[metrics] needs the Python package prometheus_client, and it is not installed.",
            "`pip install conntrackd[metrics]`, or take metrics.listen out.",
        )  # fmt: skip


def daemon(machine: Machine) -> Iterator[Diagnosis]:
    """Whether the daemon runs, and what it says is wrong."""
    if machine.unreachable:
        yield Diagnosis("daemon_unreachable", ERROR, machine.unreachable, "Run doctor as root; see the daemon's log.")
    elif machine.status is None:
        yield Diagnosis("daemon_not_running", WARNING, "The daemon does not run.", "`systemctl start conntrackd`.")
    else:
        if machine.elsewhere:
            pid = machine.status.pid
            yield Diagnosis(
                "other_namespace", ERROR,
                f"The daemon (process {pid}) is in another network namespace: rules, queues, interfaces and routing of "
                "this one were not looked at.",
                f"`nsenter --net=/proc/{pid}/ns/net conntrackd doctor`.",
            )  # fmt: skip
        for problem in machine.status.problems:
            yield Diagnosis(problem.name, problem.severity, problem.message, "See `conntrackd status`.")


def capabilities(machine: Machine) -> Iterator[Diagnosis]:
    """Whether the daemon, or who would start it from here, may do what it must."""
    if machine.blind:
        text = "Only root sees iptables, nftables and the queues: rules, marks and other firewalls were not looked at."
        yield Diagnosis("not_looked_at", WARNING, text, "Run doctor as root.")
    who, pid = ("The daemon", str(machine.status.pid)) if machine.status is not None else ("This user", "self")
    try:
        found = re.search(r"^CapEff:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return
    effective = int(found[1], 16) if found else 0
    for bit, name in CAPABILITIES.items():
        if effective >> bit & 1:
            continue
        if name == "CAP_NET_RAW":
            text = f"{who} lacks {name}: rules that reject cannot answer."
            yield Diagnosis("capability_missing", WARNING, text, "Give it to the unit (AmbientCapabilities=).")
        else:
            text = f"{who} lacks {name}: neither queues nor rules can be reached."
            yield Diagnosis("capability_missing", ERROR, text, "Run as root, or give it to the unit.")


def memory(machine: Machine) -> Iterator[Diagnosis]:
    """Whether the kernel grants the buffers; a running daemon tells that itself."""
    if machine.status is not None:
        return
    wanted = wanted_buffer(machine.config.queue.max_length, machine.config.queue.socket_buffer)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as trial:
        try:
            trial.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, wanted)
        except OSError:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
        granted = trial.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    if granted < wanted:
        yield Diagnosis(
            "buffer_short", WARNING, f"The kernel would grant a queue {granted} bytes, not {wanted}.",
            f"`sysctl -w net.core.rmem_max={wanted}`, or run the daemon with CAP_NET_ADMIN.",
        )  # fmt: skip


def zones(machine: Machine) -> Iterator[Diagnosis]:
    """Whether the interfaces that the configuration names are there."""
    for sentence in empty_zones(machine.config).values():
        yield Diagnosis(
            "zone_empty", WARNING, f"{sentence[0].upper()}{sentence[1:]}.",
            "See `ip link` for its name. One that comes later is found; until then no rule of this zone matches.",
        )  # fmt: skip


def routing(machine: Machine) -> Iterator[Diagnosis]:
    """Whether the kernel forwards, and does not drop what comes in by another way than it would leave."""
    if len(machine.config.zones) > 1:
        for family, path in (("IPv4", "ipv4/ip_forward"), ("IPv6", "ipv6/conf/all/forwarding")):
            if number(f"/proc/sys/net/{path}") == 0:
                yield Diagnosis(
                    "forwarding_off", WARNING,
                    f"There are zones to forward between, and the kernel forwards no {family}.",
                    f"`sysctl -w net.{path.replace('/', '.')}=1`, if this is a router for {family}.",
                )  # fmt: skip
    strict = [name for name, value in _reverse_paths() if value == 1]
    marked = any("fwmark" in rule for rule in machine.ip_rules)
    routes = (command("ip", "-4", "-o", "route", "show", "table", "all", "default") or "").splitlines()
    ways = {found[1] for route in routes if (found := re.search(r" dev (\S+)", route))}
    if strict and (len(ways) > 1 or (marked and number("/proc/sys/net/ipv4/conf/all/src_valid_mark") == 0)):
        reason = f"default routes by {', '.join(sorted(ways))}" if len(ways) > 1 else "routing rules with a fwmark"
        yield Diagnosis(
            "rp_filter", WARNING,
            f"The strict reverse path filter is on at {', '.join(strict)}, and there are {reason}: the kernel drops "
            "packets behind conntrackd's first queue, and their connections are never confirmed.",
            "`sysctl -w net.ipv4.conf.INTERFACE.rp_filter=2` (loose), or src_valid_mark=1 where a mark decides.",
        )  # fmt: skip


def _reverse_paths() -> list[tuple[str, int]]:
    conf = Path("/proc/sys/net/ipv4/conf")
    everywhere = number(f"{conf}/all/rp_filter") or 0
    names = sorted(path.name for path in conf.iterdir() if path.name not in ("all", "default", "lo"))
    return [(name, max(everywhere, number(f"{conf}/{name}/rp_filter") or 0)) for name in names]


def namesake(_machine: Machine) -> Iterator[Diagnosis]:
    """netfilter.org's conntrackd, which has our name and copies the kernel's table."""
    here = os.stat("/proc/self/ns/net").st_ino
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            named = (entry / "comm").read_text() == "conntrackd\n"
            if named and os.stat(entry / "ns/net").st_ino == here and "python" not in os.readlink(entry / "exe"):
                yield Diagnosis(
                    "other_conntrackd", WARNING, f"netfilter.org's conntrackd runs here (process {entry.name}).",
                    "It copies the kernel's table, not ours: stop it, or let it look after another machine.",
                )  # fmt: skip
        except OSError:
            continue  # it has ended
    if OTHER_CONF.exists():
        yield Diagnosis(
            "other_conntrackd_files", WARNING, f"{OTHER_CONF} belongs to netfilter.org's conntrackd.",
            "Both programs have one name: see which of them `conntrackd` and the unit of that name are.",
        )  # fmt: skip


def clock(_machine: Machine) -> Iterator[Diagnosis]:
    """Whether the clocks can be trusted, and are cheap to read."""
    yield from wall_clock(time.time(), Path(conntrackd.__file__).stat().st_mtime)
    source = CLOCK.read_text().strip() if CLOCK.exists() else ""
    if source in SLOW_CLOCKS:
        yield Diagnosis(
            "clock_slow", WARNING, f"The kernel reads its time from {source}, which takes microseconds each time.",
            "See `dmesg | grep -i tsc` for why it does not use the processor's counter.",
        )  # fmt: skip


def wall_clock(now_s: float, installed_s: float) -> Iterator[Diagnosis]:
    """Whether the time of day may be right: it is not before conntrackd was installed."""
    if now_s < installed_s:
        yield Diagnosis(
            "clock_wrong", WARNING,
            f"The clock says {time.strftime('%Y-%m-%d %H:%M', time.gmtime(now_s))} UTC, and conntrackd was installed "
            "later: times in logs, events and snapshots are wrong.",
            "Set it, and let NTP keep it (`timedatectl set-ntp true`).",
        )  # fmt: skip
