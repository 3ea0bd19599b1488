"""`make screenshots`: the pictures of the README, taken of a real daemon at work.

The network is that of the demo. What each command prints on a terminal is drawn as it is, except that its
configuration and its state are shown where they usually are.
"""

import asyncio
import os
import pty
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from termios import tcsetwinsize

from rich.console import Console
from rich.text import Text

from conntrackd.cli.topscreen import TopScreen
from tests.lab.daemon import Daemon, daemon
from tests.lab.network import Network, network, wait_until
from tests.lab.traffic import tcp_pair, udp_socket

PICTURES = Path(__file__).parents[1] / "docs" / "screenshots"
WIDTH = 132
PACKET = "tcp 10.2.0.2:40000 > 10.1.0.2:22 in wan out lan"
COMMANDS = {
    "status": ("status",),
    "flows": ("flows", "--sort", "bytes"),
    "explain": ("explain", PACKET),
}

POLICY = """\
version = 1

[zones]
lan = { interfaces = ["lan"] }
wan = { interfaces = ["wan"] }

[sets.banned]
addresses = ["198.51.100.0/24"]

[[rule]]
name = "banned"
from = "wan"
source = "@banned"
action = "drop"

[[rule]]
name = "web"
from = "lan"
to = "wan"
service = "web"
action = "accept"

[[rule]]
name = "name-servers"
from = "lan"
to = "wan"
service = "dns"
action = "accept"

[[rule]]
name = "admins"
from = "lan"
to = "any"
service = ["ssh", "ping"]
action = "accept"

[[rule]]
name = "mail-server"
from = "wan"
to = "lan"
destination = "10.1.0.2"
port = 25
protocol = "tcp"
action = "accept"
"""


@contextmanager
def traffic(net: Network) -> Iterator[None]:
    """Keep a small office busy: downloads, name servers, shells, mail, and strangers at the door."""
    over = threading.Event()
    bulk = [tcp_pair(net.client, net.server, family, port) for family, port in ((4, 443), (6, 443), (4, 80), (4, 22))]
    bulk.append(tcp_pair(net.server, net.client, 4, 25))

    def carry(number: int, near: socket.socket, far: socket.socket) -> None:
        while not over.wait(0.05):
            far.sendall(bytes(random.randrange(200_000) >> 2 * number))
            near.settimeout(0.01)
            try:
                while near.recv(1 << 16):
                    pass
            except TimeoutError:
                pass

    names = [udp_socket(net.client, family) for family in (4, 6)]
    servers = [udp_socket(net.server, family, 53) for family in (4, 6)]
    for family, name, server in zip((4, 6), names, servers, strict=True):
        name.sendto(bytes(40), (net.server.address(family), 53))
        server.sendto(bytes(120), server.recvfrom(100)[1])
    net.client.run("ping", "-c", "3", "-i", "0.2", net.server.ipv4)
    for family, port in ((4, 22), (4, 23), (4, 3389), (6, 22), (4, 22)):
        net.server.run("nc", "-z", "-w", "1", net.client.address(family), str(port), check=False)
    waiting = net.client.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    waiting.setblocking(False)
    waiting.connect_ex(("10.2.0.99", 443))  # where nobody answers
    threads = [threading.Thread(target=carry, args=(number, *pair)) for number, pair in enumerate(bulk)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def on_terminal(fw: Daemon, *words: str) -> str:
    """What a command prints on a terminal."""
    master, slave = pty.openpty()
    tcsetwinsize(slave, (50, WIDTH))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        fw.router.argv(*fw.command(*words)), stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    printed = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the terminal of a process that has ended
            break
        if not part:
            break
        printed += part
    os.close(master)
    process.wait()
    text = printed.decode().replace("\r\n", "\n")
    return text.replace(str(fw.config_path), "/etc/conntrackd/conntrackd.toml").replace(
        str(fw.directory / "state"), "/var/lib/conntrackd"
    )


def draw(name: str, command: str, printed: str) -> None:
    """Draw a terminal with a command and what it printed."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    console.print(Text.from_ansi(printed.rstrip("\n")), soft_wrap=False)
    save(name, console.export_svg(title=f"conntrackd {name}"))


def save(name: str, picture: str) -> None:
    """Write a picture, without blanks at the ends of its lines."""
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / f"{name}.svg").write_text("".join(f"{line.rstrip(' ')}\n" for line in picture.split("\n")))


async def top(fw: Daemon) -> str:
    """The screen of `top` once it has measured."""
    app = TopScreen(str(fw.socket_path), "", "flow", "rate", 1.0)
    async with app.run_test(size=(WIDTH, 18)) as pilot:
        while not any(row.rate for row in app.leading):
            await pilot.pause(0.1)
        await pilot.pause(0.5)
        return app.export_screenshot(title="conntrackd top")


def main() -> int:
    """Take all pictures."""
    if os.geteuid() != 0:
        print("The network is built of namespaces: run it as root.", file=sys.stderr)
        return 1
    with network() as net, daemon(net.router, POLICY) as fw, traffic(net):
        wait_until(lambda: len(fw.flows()) >= 8, "the office is busy")
        save("top", asyncio.run(top(fw)))
        for name, words in COMMANDS.items():
            command = " ".join(f"'{word}'" if " " in word else word for word in ("conntrackd", *words))
            draw(name, command, on_terminal(fw, *words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
