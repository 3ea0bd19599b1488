"""The contestants: what stands in the router while traffic goes through it.

    a         plain routing
    b         the kernel's nf_conntrack with the policy as nft rules
    c-...     a minimal C program on libnetfilter_queue that accepts packets one by one (noop.c)
    d-...     NetfilterQueue with a callback that only accepts (noop.py)
    e-...     the same with scapy parsing the packet in the callback
    f         conntrackd, pure Python
    g         conntrackd, its packet path compiled

-pre: at PREROUTING only. -both: at PREROUTING and POSTROUTING, a queue for each. -naive: at both with one queue, as a
first program has it; runs only when asked for by its full name. All queues have the length and the buffer that
conntrackd gives its own.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from benchmarks.programs import HERE, ROOT, program
from conntrackd.config import Queue
from tests.lab.daemon import POLICY, daemon
from tests.lab.network import LabError, Network

QUEUE_LENGTH = Queue().max_length
SOCKET_BUFFER = Queue().socket_buffer
COMPILED = ROOT / "build" / "compiled"

# What tests.lab.daemon.POLICY says.
NFT_POLICY = """
table inet firewall {
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        iifname "lan" oifname "wan" ct state new accept
    }
    chain input {
        type filter hook input priority 0; policy drop;
        ct state established,related accept
        iifname "lan" ct state new accept
    }
}
"""

PRE = "*raw\n-A PREROUTING ! -i lo -j NFQUEUE --queue-num {}\nCOMMIT\n"
POST = "*mangle\n-A POSTROUTING ! -o lo -j NFQUEUE --queue-num {}\nCOMMIT\n"
PLACES = {"pre": ("at PREROUTING", PRE.format(0), ["0"])}
PLACES["both"] = ("at both hooks", PRE.format(0) + POST.format(1), ["0", "1"])
PLACES["naive"] = ("at both hooks, one queue", PRE.format(0) + POST.format(0), ["0"])


@dataclass(frozen=True)
class Contestant:
    """One of them: `stand` puts it into the router and yields the process id of its daemon, None if it has none."""

    name: str
    title: str
    stand: Callable[[Network], AbstractContextManager[int | None]]
    by_default: bool = True


@contextmanager
def _routing(_net: Network) -> Iterator[int | None]:
    yield None


@contextmanager
def _nf_conntrack(net: Network) -> Iterator[int | None]:
    net.router.run("nft", "-f", "-", stdin=NFT_POLICY)
    yield None


def _queueing(rules: str, command: list[str]) -> Callable[[Network], AbstractContextManager[int | None]]:
    @contextmanager
    def stand(net: Network) -> Iterator[int | None]:
        net.router.run("iptables-legacy-restore", "--noflush", stdin=rules)
        process = net.router.start(*command)
        process.wait_for_output("ready")
        yield process.pid
        if not process.running:
            raise LabError(f"{command[0]} ended: {process.output()}")

    return stand


def _conntrackd(env: dict[str, str]) -> Callable[[Network], AbstractContextManager[int | None]]:
    @contextmanager
    def stand(net: Network) -> Iterator[int | None]:
        with daemon(net.router, POLICY, env=env) as running:
            assert running.process is not None
            yield running.process.pid
            if not running.process.running:
                raise LabError(f"conntrackd ended: {running.log()}")

    return stand


def conntrackd_env(compiled: bool) -> dict[str, str]:
    """The environment in which conntrackd runs compiled, or pure. LabError if it would not (see `make compile`)."""
    env = {"PYTHONPATH": str(COMPILED)} if compiled else {"PYTHONPATH": str(ROOT), "CONNTRACKD_PURE": "1"}
    command = [sys.executable, "-c", "import conntrackd.hooks; print(conntrackd.hooks.__file__)"]
    found = subprocess.run(command, env={**os.environ, **env}, cwd="/", capture_output=True, text=True, check=True)
    if found.stdout.strip().endswith(".so") != compiled:
        raise LabError(f"conntrackd is not {'compiled (run `make compile`)' if compiled else 'pure'}: {found.stdout}")
    return env


def _contestants() -> Iterator[Contestant]:
    yield Contestant("a", "plain routing", _routing)
    yield Contestant("b", "nf_conntrack", _nf_conntrack)
    sizes = [str(QUEUE_LENGTH), str(SOCKET_BUFFER)]
    noop_py = [sys.executable, str(HERE / "noop.py")]
    for letter, title, command in (
        ("c", "C, one by one", [str(program("noop")), *sizes]),
        ("d", "NetfilterQueue no-op", [*noop_py, "noop", *sizes]),
        ("e", "scapy", [*noop_py, "scapy", *sizes]),
    ):
        for place, (where, rules, queues) in PLACES.items():
            stand = _queueing(rules, [*command, *queues])
            yield Contestant(f"{letter}-{place}", f"{title}, {where}", stand, by_default=place != "naive")
    yield Contestant("f", "conntrackd pure", lambda net: _conntrackd(conntrackd_env(False))(net))
    yield Contestant("g", "conntrackd compiled", lambda net: _conntrackd(conntrackd_env(True))(net))


def contestants() -> dict[str, Contestant]:
    """All of them by name, in the order in which they are shown."""
    return {each.name: each for each in _contestants()}
