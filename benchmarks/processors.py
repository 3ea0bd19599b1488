"""Processor time: what a process on a processor of its own takes, with the softirqs that run on its behalf.

A verdict lets the kernel forward the packet within the system call that gives it, up to the socket of the receiver on
the next host of this machine. So the processor time of the daemon holds the kernel's way of the packet from there on,
for every contestant alike; what the softirq thread of the daemon's processor takes over belongs to it, too.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

TRAFFIC_CPU = 0
DAEMON_CPU = 1
CLOCK_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def pin(pid: int, cpu: int) -> None:
    """Bind all threads of a process to one processor."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})


def ran_ns(pid: int) -> int:
    """Time that the threads of a process have run, ns."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def softirq_thread(cpu: int) -> int:
    """The kernel thread that runs the softirqs of a processor when they are many; its process id."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == f"ksoftirqd/{cpu}":
                return int(comm.parent.name)
        except FileNotFoundError:  # a process that has just ended
            continue
    raise RuntimeError(f"this kernel has no thread ksoftirqd/{cpu}")


def busy_ns() -> int:
    """Time that the processors were not idle, ns, all together, whoever used them; only differences have a meaning."""
    idle_ticks = 0
    processors = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu":
            # Idle time is kept exactly, busy time only by what each tick happens to meet.
            idle_ticks += int(ticks[3]) + int(ticks[4])
            processors += 1
    return time.monotonic_ns() * processors - idle_ticks * CLOCK_TICK_NS


@dataclass(frozen=True)
class Spent:
    """Processor time since some beginning, ns: of the daemon, and of the whole machine."""

    daemon: int
    machine: int

    def __sub__(self, before: "Spent") -> "Spent":
        return Spent(self.daemon - before.daemon, self.machine - before.machine)


class Meter:
    """Reads the time spent: by the machine, and by a daemon that is pinned to DAEMON_CPU, if there is one."""

    def __init__(self, pid: int | None) -> None:
        self._pids = () if pid is None else (pid, softirq_thread(DAEMON_CPU))

    def read(self) -> Spent:
        return Spent(sum(map(ran_ns, self._pids)), busy_ns())
