"""`make demo`: the main job on real packets, told while it happens.

Builds client - router - server out of namespaces, runs conntrackd in the router, and drives traffic with ordinary
tools. Each sentence with a tick has been checked; the exit code is 0 only if every one of them held.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tests.lab.daemon import CONNTRACKD, POLICY, Daemon, daemon
from tests.lab.network import Host, LabError, Network, network, wait_until
from tests.lab.traffic import Arrivals

HTTP_PORT = 8000
UDP_PORT = 5300
INSIDE_PORT = 8080
FILE_BYTES = 10_000_000
PINGS = 3

Flow = dict[str, Any]


class Story:
    """What the reader sees: headings, commands with their output, and claims, which are counted."""

    def __init__(self) -> None:
        self.held = 0
        self.failed: list[str] = []
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    def heading(self, text: str) -> None:
        """Begin a part."""
        print(f"\n{self._paint(text, '1')}", flush=True)

    def say(self, text: str) -> None:
        """Tell something that needs no proof."""
        print(f"  {text}", flush=True)

    def command(self, command: str) -> None:
        """Show a command as the reader could type it."""
        print(f"  {self._paint('$ ' + command, '36')}", flush=True)

    def output(self, text: str) -> None:
        """Show what a command printed."""
        for line in text.strip("\n").splitlines():
            print(f"    {line}")
        sys.stdout.flush()

    def claim(self, sentence: str, held: object) -> None:
        """State something, and whether it was found to be so."""
        if held:
            self.held += 1
            print(f"  {self._paint('ok', '32')}      {sentence}", flush=True)
        else:
            self.failed.append(sentence)
            print(f"  {self._paint('FAILED', '1;31')}  {sentence}", flush=True)


class Demo:
    """The parts of the story, on one network with one daemon."""

    def __init__(self, story: Story, net: Network, fw: Daemon, directory: Path) -> None:
        self.story = story
        self.net = net
        self.fw = fw
        self.directory = directory

    def tell(self) -> None:
        """All parts in order."""
        self.build()
        self.ping()
        self.curl()
        self.udp()
        self.outside()
        self.counters()

    # --- The parts ------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Show the network, install the rules, start the daemon."""
        story, net, fw = self.story, self.net, self.fw
        story.heading("A client, a router and a server, each in a network namespace of its own")
        story.say(f"{net.client.netns}   {net.client.ipv4}  {net.client.ipv6}   at the router's interface lan")
        story.say(f"{net.router.netns}   conntrackd runs here; lan may open connections, wan may only answer")
        story.say(f"{net.server.netns}   {net.server.ipv4}  {net.server.ipv6}   at the router's interface wan")

        story.heading("The rules that hand the router's packets to conntrackd, and conntrackd itself")
        story.command(shown(net.router.argv(*fw.command("rules", "install", "--config", fw.config_path))))
        fw.install_rules()
        story.command(shown(net.router.argv(*fw.command("run", "--config", fw.config_path))) + " &")
        fw.start()
        story.claim("conntrackd answers, and both of its queues are bound", len(fw.queues()) == 2)

    def ping(self) -> None:
        """Ping through the router over both families."""
        self.story.heading("The client pings the server")
        for family, protocol in (4, "icmp"), (6, "icmpv6"):
            address = self.net.server.address(family)
            done = self.run(self.net.client, "ping", "-n", "-c", str(PINGS), "-i", "0.2", address)
            self.story.output(done.stdout.split("\n\n")[-1])
            flow = self.flow(protocol, dst=address)
            self.story.claim(
                f"IPv{family}: {PINGS} of {PINGS} were answered, and the flow counts {PINGS} packets each way",
                done.returncode == 0
                and flow["orig"]["packets"] == flow["reply"]["packets"] == PINGS
                and "SEEN_REPLY" in flow["status"],
            )
        self.table()

    def curl(self) -> None:
        """Fetch a file over HTTP, and look at the connection while it lasts and afterwards."""
        self.story.heading(f"The client fetches {FILE_BYTES // 1_000_000} MB over HTTP")
        content = os.urandom(FILE_BYTES)
        (self.directory / "file").write_bytes(content)
        server = self.net.server.start(
            sys.executable, "-um", "http.server", "--bind", "::", "--directory", self.directory, str(HTTP_PORT)
        )
        server.wait_for_output("Serving")
        for family in 4, 6:
            command = self.net.client.argv("curl", "--silent", "--fail", self.url(family))
            self.story.command(shown(command))
            self.story.say("(its output is not read before we have looked at the connection)")
            address = self.net.server.address(family)
            # curl can write no further than the pipe is long, so the connection lasts until then.
            with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as curl:
                flow = self.wait_for_flow("the transfer is on its way", "tcp", "ESTABLISHED", dst=address)
                self.table()
                self.story.claim(
                    f"IPv{family}: while it lasts the connection is ESTABLISHED and ASSURED",
                    "ASSURED" in flow["status"],
                )
                got, _ = curl.communicate(timeout=60)
            flow = self.wait_for_flow("both sides have closed", "tcp", "TIME_WAIT", dst=address)
            self.story.claim(
                f"IPv{family}: the file arrived whole, the connection is in TIME_WAIT, "
                f"and its answers counted {flow['reply']['bytes']:,} bytes with their headers",
                curl.returncode == 0 and got == content and flow["reply"]["bytes"] > FILE_BYTES,
            )

    def udp(self) -> None:
        """A question and an answer over UDP."""
        self.story.heading("The client asks the server something over UDP")
        for family in 4, 6:
            address = self.net.server.address(family)
            server = self.net.server.start("sh", "-c", f"echo pong | nc -{family} -u -l {UDP_PORT}")
            self.wait_for_listener(self.net.server, "udp", family, UDP_PORT)
            done = self.run(self.net.client, "sh", "-c", f"echo ping | nc -u -W 1 -w 5 {address} {UDP_PORT}")
            self.story.output(done.stdout)
            server.wait_for_output("ping")  # it may have answered before it has printed what it was asked
            server.stop()
            flow = self.flow("udp", dst=address, dport=UDP_PORT)
            self.story.claim(
                f"IPv{family}: the answer passed the router because the client had asked",
                done.stdout == "pong\n" and "ping\n" in server.output() and "SEEN_REPLY" in flow["status"],
            )
        self.table()

    def outside(self) -> None:
        """Connections that begin at the server."""
        story = self.story
        story.heading("The server tries to reach the client, which nobody asked it to")
        listener = self.net.client.start(
            sys.executable, "-um", "http.server", "--bind", "::", "--directory", self.directory, str(INSIDE_PORT)
        )
        listener.wait_for_output("Serving")
        own = self.net.client.run("nc", "-z", "-w", "2", "127.0.0.1", str(INSIDE_PORT), check=False)
        story.claim(f"port {INSIDE_PORT} of the client is open: the client itself reaches it", own.returncode == 0)
        arrivals = Arrivals(self.net.client)
        for family in 4, 6:
            address = self.net.client.address(family)
            tcp = self.run(self.net.server, "nc", "-z", "-w", "1", address, str(INSIDE_PORT))
            drop = self.fw.wait_for_drop(protocol="tcp", dst=address, dport=INSIDE_PORT)
            story.claim(f"IPv{family}: the TCP connection was not made", tcp.returncode != 0 and blocked(drop))
            self.run(self.net.server, "sh", "-c", f"echo knock | nc -u -w 1 {address} {UDP_PORT}")
            drop = self.fw.wait_for_drop(protocol="udp", dst=address, dport=UDP_PORT)
            story.claim(f"IPv{family}: the UDP packet was dropped", blocked(drop))
        arrived = arrivals.to_port(INSIDE_PORT) or arrivals.having(b"knock")
        story.claim("none of these packets arrived at the client", not arrived)
        story.say("Why they were dropped:")
        self.cli("drops")
        story.claim(
            "the table knows nothing of them",
            not [flow for flow in self.fw.flows() if flow["orig"].get("dport") == INSIDE_PORT],
        )

    def counters(self) -> None:
        """The counters at the end."""
        self.story.heading("The counters")
        self.cli("stats")
        stats, status = self.fw.stats(), self.fw.status()
        self.story.claim(
            f"{stats['insert']} connections were confirmed, and no packet made conntrackd fail",
            stats["insert"] >= 6 and not any(queue["errors"] for queue in status["queues"]),
        )
        self.fw.wait_for_empty_queues()
        self.story.claim(
            "the kernel lost no packet on the way to conntrackd, and none is left in a queue",
            all(queue.dropped_full == queue.dropped_socket == 0 for queue in self.fw.queues().values()),
        )

    def stay(self) -> None:
        """Say what can be tried, and wait until the reader has had enough."""
        story, net, fw = self.story, self.net, self.fw
        story.heading("The network stays up. Try from another terminal, for example:")
        for words in ("flows",), ("stats",), ("drops",), ("status",), ("flows", "-o", "json"):
            story.command(shown(fw.command(*words)))
        story.command(shown(net.client.argv("ping", net.server.ipv4)))
        story.command(shown(net.client.argv("curl", "-o", "/dev/null", self.url(6))))
        story.command(shown(net.server.argv("nc", "-v", "-z", "-w", "2", net.client.ipv4, str(INSIDE_PORT))))
        story.command(shown(net.router.argv("iptables-legacy-save")))
        story.command(shown(net.router.argv("cat", "/proc/net/netfilter/nfnetlink_queue")))
        story.command(shown(net.client.argv("bash")))
        story.say("Enter or Ctrl-C takes everything down.")
        try:
            if not sys.stdin.readline():  # nothing to read from
                signal.pause()
        except KeyboardInterrupt:
            pass  # said above to be the way out

    # --- Helpers --------------------------------------------------------------------------------------------

    def run(self, host: Host, *command: str) -> subprocess.CompletedProcess[str]:
        """Show a command and run it."""
        self.story.command(shown(host.argv(*command)))
        return host.run(*command, check=False)

    def cli(self, *words: str) -> None:
        """Show a conntrackd command and what it prints."""
        self.story.command(shown(self.fw.command(*words)))
        self.story.output(self.fw.cli(*words).stdout)

    def table(self) -> None:
        """Show the flow table."""
        self.cli("flows")

    def flow(self, protocol: str, **orig: Any) -> Flow:
        """The one flow with these values."""
        return self.fw.flow(protocol, **orig)

    def wait_for_flow(self, what: str, protocol: str, state: str, **orig: Any) -> Flow:
        """Wait until a flow with these values is in this state."""

        def found() -> list[Flow]:
            flows = [flow for flow in self.fw.flows() if (flow["protocol"], flow["state"]) == (protocol, state)]
            return [flow for flow in flows if orig.items() <= flow["orig"].items()]

        return wait_until(found, what)[0]

    def wait_for_listener(self, host: Host, protocol: str, family: int, port: int) -> None:
        """Wait until something in the namespace is bound to the port."""
        table = f"net/{protocol}6" if family == 6 else f"net/{protocol}"
        wait_until(lambda: f":{port:04X} " in host.read(table), f"port {port} of {host.netns} is bound")

    def url(self, family: int) -> str:
        """The file on the server."""
        host = f"[{self.net.server.ipv6}]" if family == 6 else self.net.server.ipv4
        return f"http://{host}:{HTTP_PORT}/file"


def blocked(drop: dict[str, Any]) -> bool:
    """Whether a packet was dropped because the policy says so."""
    return (drop["reason"], drop["rule"]) == ("policy", "default-forward")


def shown(argv: list[str]) -> str:
    """A command line as the reader can type it where the demo was started."""
    cwd = f"{Path.cwd()}/"
    return shlex.join(word.removeprefix(cwd) if word == str(CONNTRACKD) else word for word in argv)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the demo as Ctrl-C does: with everything taken down."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    # A shell that starts a job in the background without job control has it ignore SIGINT.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int:
    """Run the demo: 0 when every claim held, 1 when not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description="conntrackd on real packets.")
    parser.add_argument("--stay", action="store_true", help="leave the network up until Enter or Ctrl-C")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("The demo builds network namespaces: run it as root.", file=sys.stderr)
        return 1
    story = Story()
    try:
        with (
            ended_by_signals(),
            tempfile.TemporaryDirectory(prefix="conntrackd-demo-") as directory,
            network() as net,
            daemon(net.router, POLICY, start=False) as fw,
        ):
            demo = Demo(story, net, fw, Path(directory))
            demo.tell()
            if arguments.stay:
                demo.stay()
    except KeyboardInterrupt:
        print("\nInterrupted; everything is taken down.")
        return 130
    except LabError as error:
        story.claim(str(error), held=False)
    if story.failed:
        story.heading(f"{len(story.failed)} of {len(story.failed) + story.held} claims did not hold:")
        for sentence in story.failed:
            story.say(sentence)
        return 1
    story.heading(f"All {story.held} claims were checked and held. Everything is taken down again.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
