"""A private network of namespaces: client - router - server over veth pairs, with IPv4 and IPv6.

Each host is a network namespace of its own; the machine's own namespace is never touched. Segment number N
joins one host to the router:

    host  eth0 10.N.0.2/24 fd00:N::2/64  ----  10.N.0.1/24 fd00:N::1/64  router

Sockets and sysctls of a namespace are reached from a short-lived thread that enters it, because setns() is a
matter of one thread: the thread of the caller never leaves the machine's own namespace.
"""

import errno
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import IPRoute, netns

T = TypeVar("T")

PREFIX = "ct-"


class LabError(Exception):
    """Something in the lab did not do what was asked; says the command and what came out of it."""


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = 10.0, pause_s: float = 0.01) -> T:
    """Call until the answer is true and return it; LabError naming `what` when time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout_s:g} s in vain: {what} (last answer: {answer!r})")
        time.sleep(pause_s)


class Process:
    """A command running in the background inside a namespace; its output is kept in a file without a name."""

    def __init__(self, argv: list[str], env: Mapping[str, str], fds: Sequence[int] = ()) -> None:
        self.argv = argv
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        # A session of its own: Ctrl-C on the terminal reaches only the lab, which then ends things in order.
        self.popen = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            pass_fds=fds,
        )

    @property
    def pid(self) -> int:
        """Process id of the command itself (`ip netns exec` replaces itself by it)."""
        return self.popen.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.popen.poll() is None

    def output(self) -> str:
        """Everything it has printed so far, stdout and stderr in one."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def wait_for_output(self, text: str, timeout_s: float = 10.0) -> None:
        """Return once it has printed `text`; LabError when it ends before or takes longer."""

        def printed() -> bool:
            if text in self.output():
                return True
            if not self.running:
                raise LabError(
                    f"{' '.join(self.argv)} ended ({self.popen.returncode}) before it printed {text!r}: {self.output()}"
                )
            return False

        wait_until(printed, f"{' '.join(self.argv)} prints {text!r}", timeout_s)

    def wait(self, timeout_s: float = 10.0) -> int:
        """Wait for its end; its exit code."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LabError(f"{' '.join(self.argv)} did not end in {timeout_s:g} s: {self.output()}") from None

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.running:
            self.popen.send_signal(number)

    def stop(self, timeout_s: float = 5.0) -> int:
        """SIGTERM to it and what it has started, SIGKILL when that does not help within `timeout_s`; its exit code."""
        self._signal_all(signal.SIGTERM)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL to it and what it has started; its exit code."""
        self._signal_all(signal.SIGKILL)
        return self.popen.wait()

    def _signal_all(self, number: int) -> None:
        # Until its end has been asked for, its id and that of its session are nobody else's.
        if self.running:
            os.killpg(self.pid, number)

    def close(self) -> None:
        """Stop it and forget its output."""
        self.stop()
        self._output.close()


class Host:
    """One namespace of the network: commands, sockets and functions inside it."""

    def __init__(self, name: str, segment: int = 0) -> None:
        self.netns = name
        self.ipv4 = f"10.{segment}.0.2"
        self.ipv6 = f"fd00:{segment}::2"
        self._processes: list[Process] = []
        self._sockets: list[socket.socket] = []

    def address(self, family: int) -> str:
        """The address of the host: family 4 or 6."""
        return self.ipv6 if family == 6 else self.ipv4

    def argv(self, *command: str | Path) -> list[str]:
        """The command as it is run from outside of the namespace."""
        return ["ip", "netns", "exec", self.netns, *map(str, command)]

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. With `check`, LabError with its output when it fails."""
        done = subprocess.run(
            self.argv(*command),
            input=stdin,
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {})},
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
        if check and done.returncode:
            raise LabError(f"{' '.join(map(str, command))} failed ({done.returncode}): {done.stdout}{done.stderr}")
        return done

    def start(self, *command: str | Path, env: Mapping[str, str] | None = None, fds: Sequence[int] = ()) -> Process:
        """Start a command in the background, with these descriptors; it is stopped with the network at the latest."""
        process = Process(self.argv(*command), {**os.environ, **(env or {})}, fds)
        self._processes.append(process)
        return process

    def call(self, function: Callable[[], T]) -> T:
        """Run a function of ours inside the namespace: its result or its exception."""
        result: list[T] = []
        failure: list[BaseException] = []

        def inside() -> None:
            try:
                netns.setns(self.netns, flags=0)
                result.append(function())
            except BaseException as error:  # handed over to the caller's thread below
                failure.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def open_socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of the namespace, usable from anywhere; no call on it waits longer than 10 s."""
        made = self.call(lambda: socket.socket(family, kind, protocol))
        made.settimeout(10.0)
        return self.adopt(made)

    def adopt(self, made: socket.socket) -> socket.socket:
        """Close this socket with the network, too (one from accept(), for example)."""
        self._sockets.append(made)
        return made

    def read(self, path: str) -> str:
        """A file under /proc as the namespace sees it; `net/...` is the namespace's own /proc/net."""
        # /proc/net is a link to the process, whose main thread stays outside.
        full = f"/proc/thread-self/{path}" if path.startswith("net/") else path
        return self.call(lambda: Path(full).read_text())

    def sysctl(self, name: str, value: int) -> None:
        """Set a sysctl of the namespace: sysctl("net/ipv4/ip_forward", 1)."""

        def write() -> None:
            Path("/proc/sys", name).write_text(str(value))

        self.call(write)

    def configure(self, change: Callable[[Any], None]) -> None:
        """Hand an IPRoute of the namespace to `change`."""

        def inside() -> None:
            with IPRoute() as ipr:
                change(ipr)

        self.call(inside)

    def close(self) -> None:
        """Close every socket and stop every process that was started here, the youngest first."""
        while self._sockets:
            self._sockets.pop().close()
        while self._processes:
            self._processes.pop().close()


class Network:
    """The router and the hosts around it. Use `network()`, which always takes it down."""

    def __init__(self, mtu: int = 1500) -> None:
        self.mtu = mtu
        self.prefix = f"{PREFIX}{secrets.token_hex(3)}"
        self.hosts: list[Host] = []
        self.segments = 0

    def build(self) -> None:
        """Create router, client (at the router's `lan`) and server (at the router's `wan`)."""
        self.router = self._add_namespace("router", 0)
        for family in "ipv4/ip_forward", "ipv6/conf/all/forwarding":
            self.router.sysctl(f"net/{family}", 1)
        self.client = self.add_host("client", "lan")
        self.server = self.add_host("server", "wan")

    def _add_namespace(self, role: str, segment: int) -> Host:
        host = Host(f"{self.prefix}-{role}", segment)
        self.hosts.append(host)  # before it exists: taking down a namespace that is not there is no error
        subprocess.run(["ip", "netns", "add", host.netns], check=True, start_new_session=True)
        # Without duplicate address detection an IPv6 address can be used at once.
        # Without the reverse path filter a test can send from any address.
        for name in "ipv6/conf/%s/accept_dad", "ipv6/conf/%s/dad_transmits", "ipv4/conf/%s/rp_filter":
            host.sysctl(f"net/{name % 'all'}", 0)
            host.sysctl(f"net/{name % 'default'}", 0)
        # A host that owes an ICMP error sends it, however many it has sent just now.
        host.sysctl("net/ipv4/icmp_ratelimit", 0)
        host.sysctl("net/ipv6/icmp/ratelimit", 0)
        host.configure(lambda ipr: ipr.link("set", ifname="lo", state="up"))
        return host

    def add_host(self, role: str, router_ifname: str, mtu: int = 0) -> Host:
        """One more host at an interface of the router of its own; `mtu` 0: that of the network."""
        self.segments += 1
        n = self.segments
        mtu = mtu or self.mtu
        host = self._add_namespace(role, n)

        def at_router(ipr: Any) -> None:
            ipr.link("add", ifname=router_ifname, kind="veth", peer={"ifname": "eth0", "net_ns_fd": host.netns})
            index = ipr.link_lookup(ifname=router_ifname)[0]
            ipr.link("set", index=index, mtu=mtu, state="up")
            ipr.addr("add", index=index, address=f"10.{n}.0.1", prefixlen=24)
            ipr.addr("add", index=index, address=f"fd00:{n}::1", prefixlen=64)

        def at_host(ipr: Any) -> None:
            index = ipr.link_lookup(ifname="eth0")[0]
            ipr.link("set", index=index, mtu=mtu, state="up")
            ipr.addr("add", index=index, address=host.ipv4, prefixlen=24)
            ipr.addr("add", index=index, address=host.ipv6, prefixlen=64)
            ipr.route("add", dst="0.0.0.0/0", gateway=f"10.{n}.0.1")
            ipr.route("add", dst="::/0", gateway=f"fd00:{n}::1")

        self.router.configure(at_router)
        host.configure(at_host)
        return host

    def close(self) -> None:
        """Stop all processes and remove all namespaces."""
        for host in reversed(self.hosts):
            host.close()
        while self.hosts:
            _remove_namespace(self.hosts[-1].netns)
            self.hosts.pop()


def _remove_namespace(name: str) -> None:
    try:
        netns.remove(name)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


@contextmanager
def network(mtu: int = 1500) -> Iterator[Network]:
    """Build the network, and take it down whatever happens: failure, Ctrl-C, another Ctrl-C meanwhile."""
    net = Network(mtu)
    try:
        net.build()
        yield net
    finally:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            net.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
