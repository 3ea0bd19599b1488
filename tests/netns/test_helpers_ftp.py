"""FTP by real programs: only the control port is allowed, and the helper lets the data connections through."""

import ftplib
import json
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.daemon import daemon
from tests.lab.network import Host, Network, wait_until
from tests.lab.programs import ftp_server
from tests.lab.traffic import tcp_listener, tcp_pair

CONFIG = """\
version = 1

[zones.lan]
interfaces = ["lan"]

[zones.wan]
interfaces = ["wan"]

[[rule]]
name = "ftp-control"
from = "lan"
to = "wan"
protocol = "tcp"
port = [21, 2121]
{helper}
action = "accept"
"""
WITH = CONFIG.format(helper='helper = "ftp"')
WITHOUT = CONFIG.format(helper="")

SIZE = 50 << 20

TOOL = {4: "iptables-legacy", 6: "ip6tables-legacy"}
MARK_RELATED = "0x60000000/0xe0000000"
MARK_ESTABLISHED = "0x40000000/0xe0000000"

# How curl asks for each kind of data connection, and the families that have it.
MODES = {
    "epsv": (["--ftp-pasv"], (4, 6)),
    "pasv": (["--ftp-pasv", "--disable-epsv"], (4,)),
    "eprt": (["--ftp-port", "-"], (4, 6)),
    "port": (["--ftp-port", "-", "--disable-eprt"], (4,)),
}
CASES = [(mode, family) for mode, (_, families) in MODES.items() for family in families]


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A directory that the server's user may read, with one large file."""
    directory = Path(tempfile.mkdtemp(prefix="conntrackd-ftp-"))
    (directory / "files").mkdir()
    (directory / "files" / "large").write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
    yield directory
    shutil.rmtree(directory)


def url(host: Host, family: int, port: int, file: str = "") -> str:
    address = f"[{host.ipv6}]" if family == 6 else host.ipv4
    return f"ftp://{address}:{port}/{file}"


def curl(net: Network, mode: str, *arguments: str | Path) -> list[str | Path]:
    return ["curl", "--silent", "--show-error", *MODES[mode][0], *arguments]


@pytest.mark.parametrize(("mode", "family"), CASES)
@pytest.mark.parametrize("port", [21, 2121])
def test_listing_and_50_mb(net: Network, public: Path, mode: str, family: int, port: int, tmp_path: Path) -> None:
    ftp_server(net.server, public, port)
    with daemon(net.router, WITH) as fw:
        listing = net.client.run(*curl(net, mode, url(net.server, family, port))).stdout
        assert "large" in listing
        got = tmp_path / "got"
        net.client.run(*curl(net, mode, "--output", got, url(net.server, family, port, "large")))
        assert got.read_bytes() == (public / "files" / "large").read_bytes()
        stats = fw.stats()
        # Two commands, two data connections. An announcement that TCP repeats is expected anew.
        assert stats["expect_new"] == 2
        assert stats["expect_create"] >= 2


def test_blocked_without_helper(net: Network, public: Path, family: int) -> None:
    """Each kind of data connection, side by side: all of them wait in vain."""
    ftp_server(net.server, public, 21)
    modes = [mode for mode, of in CASES if of == family]
    openers = {mode: net.server if mode in ("eprt", "port") else net.client for mode in modes}
    with daemon(net.router, WITHOUT) as fw:
        address = url(net.server, family, 21)
        clients = [net.client.start(*curl(net, mode, "--max-time", "6", address)) for mode in modes]
        for client in clients:
            assert client.wait() == 28, client.output()  # timed out
            assert "large" not in client.output()
        dropped = {
            (drop["src"], drop["dport"])
            for drop in fw.drops()
            if (drop["reason"], drop["protocol"]) == ("policy", "tcp")
        }
        assert Counter(source for source, _ in dropped) == Counter(host.address(family) for host in openers.values())
        control = [flow for flow in fw.flows() if flow["orig"].get("dport") == 21]
        assert [flow["helper"] for flow in control] == [None] * len(modes)


@pytest.mark.parametrize("passive", ["on", "off"])
def test_lftp(net: Network, public: Path, family: int, passive: str, tmp_path: Path) -> None:
    ftp_server(net.server, public, 21)
    script = f"set net:max-retries 1; set net:timeout 10; set ftp:passive-mode {passive}; ls; get large -o got"
    with daemon(net.router, WITH):
        # lftp writes where it stands.
        command = f"cd {tmp_path} && exec lftp -c 'open {url(net.server, family, 21)}; {script}'"
        done = net.client.run("sh", "-c", command, env={"HOME": str(tmp_path)})
        assert "large" in done.stdout
        assert (tmp_path / "got").stat().st_size == SIZE


def test_the_data_connection_is_related_then_established(net: Network, public: Path, family: int) -> None:
    for mark in MARK_RELATED, MARK_ESTABLISHED:
        rule = ["-p", "tcp", "!", "--dport", "21", "-m", "mark", "--mark", mark, "-i", "lan"]
        net.router.run(TOOL[family], "-A", "FORWARD", *rule)
    ftp_server(net.server, public, 21)
    with daemon(net.router, WITH) as fw:
        client = net.client.start(
            *curl(net, "epsv", "--limit-rate", "100k", "--output", "/dev/null", url(net.server, family, 21, "large"))
        )

        def data() -> list[dict[str, Any]]:
            return [flow for flow in fw.flows() if flow["master"] is not None and "ASSURED" in flow["status"]]

        (child,) = wait_until(data, "the data connection is established")
        master = fw.flow("tcp", dport=21)
        assert (master["helper"], master["master"]) == ("ftp", None)
        assert (child["helper"], child["master"]) == (None, master["id"])
        assert "EXPECTED" in child["status"]
        assert "EXPECTED" not in master["status"]
        rows = net.router.run(TOOL[family], "-nvxL", "FORWARD").stdout.splitlines()[2:]
        related, established = (int(row.split()[0]) for row in rows)
        assert related >= 1  # the SYN
        assert established >= 1
        client.stop()


class Control:
    """A control connection whose both ends are ours."""

    def __init__(self, net: Network) -> None:
        self.client, self.server = tcp_pair(net.client, net.server, 4, 21)
        self.say(self.server, "220 ready")
        self.say(self.client, "USER anonymous")
        self.say(self.server, "230 welcome")
        # The helper reads what follows a line that it has seen.
        self.say(self.client, "NOOP")

    def say(self, end: socket.socket, line: str) -> None:
        """Say a line, and wait until the other end has heard it."""
        other = self.server if end is self.client else self.client
        end.sendall(line.encode() + b"\r\n")
        heard = b""
        while not heard.endswith(b"\n"):
            heard += other.recv(1000)


def comma(address: str, port: int) -> str:
    return f"{address.replace('.', ',')},{port >> 8},{port & 255}"


def connect(host: Host, address: str, port: int, timeout_s: float = 10.0) -> socket.socket:
    made = host.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    made.settimeout(timeout_s)
    made.connect((address, port))
    return made


def test_a_consumed_expectation_admits_no_second_connection(net: Network) -> None:
    with daemon(net.router, WITH) as fw:
        events = net.router.start(*fw.command("events", "--expected", "-o", "json"))
        wait_until(lambda: fw.stats()["listeners"] == 1, "the daemon has a listener")
        control = Control(net)
        tcp_listener(net.server, 4, 5000)
        control.say(control.server, f"227 Entering Passive Mode ({comma(net.server.ipv4, 5000)}).")
        (expected,) = fw.json("flows", "--expected")
        assert (expected["helper"], expected["master"]) == ("ftp", fw.flow("tcp", dport=21)["id"])
        assert (expected["src"], expected["sport"]) == (net.client.ipv4, None)
        assert (expected["dst"], expected["dport"]) == (net.server.ipv4, 5000)
        assert 290 <= expected["timeout_seconds"] <= 300
        assert "ftp" in fw.cli("flows", "--expected").stdout

        connect(net.client, net.server.ipv4, 5000)
        assert fw.json("flows", "--expected") == []
        with pytest.raises(TimeoutError):
            connect(net.client, net.server.ipv4, 5000, 1.0)
        assert fw.wait_for_drop(reason="policy", dport=5000)["rule"] == "default-forward"
        told = [json.loads(line) for line in events.output().splitlines()]
        assert [(event["type"], event["expectation"]["id"]) for event in told[:2]] == [
            ("NEW", expected["id"]),
            ("DESTROY", expected["id"]),
        ]


def test_what_is_expected_can_be_killed(net: Network) -> None:
    with daemon(net.router, WITH) as fw:
        control = Control(net)
        tcp_listener(net.server, 4, 5000)
        control.say(control.server, f"227 Entering Passive Mode ({comma(net.server.ipv4, 5000)}).")
        done = fw.cli("kill", "--expected", "--dry-run", "dst port 21")
        assert f"{net.server.ipv4}:5000" in done.stdout
        assert done.stderr == "1 expectation would be ended: nothing was changed.\n"
        assert fw.cli("kill", "--expected", "dst port 21").stderr == "1 expectation ended.\n"
        assert fw.json("flows", "--expected") == []
        with pytest.raises(TimeoutError):
            connect(net.client, net.server.ipv4, 5000, 1.0)
        fw.wait_for_drop(reason="policy", dport=5000)
        control.say(control.client, "NOOP")  # the control connection goes on


def test_port_for_a_third_party_is_refused(net: Network) -> None:
    victim = net.add_host("victim", "dmz")
    with daemon(net.router, WITH) as fw:
        control = Control(net)
        tcp_listener(victim, 4, 5000)
        tcp_listener(net.client, 4, 5000)
        control.say(control.client, f"PORT {comma(victim.ipv4, 5000)}")
        assert fw.json("flows", "--expected") == []
        with pytest.raises(TimeoutError):
            connect(net.server, victim.ipv4, 5000, 1.0)
        fw.wait_for_drop(reason="policy", dst=victim.ipv4, dport=5000)
        # The client's own address is taken.
        control.say(control.client, f"PORT {comma(net.client.ipv4, 5000)}")
        connect(net.server, net.client.ipv4, 5000)


def test_expectations_go_with_their_master(net: Network) -> None:
    with daemon(net.router, WITH + '[conntrack]\ntcp_timeout_close = "1s"\n') as fw:
        control = Control(net)
        control.say(control.server, f"227 Entering Passive Mode ({comma(net.server.ipv4, 5000)}).")
        assert len(fw.json("flows", "--expected")) == 1
        # A reset ends the control connection for good after its timeout.
        control.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        control.client.close()
        wait_until(lambda: not fw.json("flows", "--expected"), "the expectation has gone", 30.0)
        assert fw.stats()["expect_delete"] == 1


def test_an_unfinished_command_is_dropped_until_it_is_whole(net: Network) -> None:
    with daemon(net.router, WITH) as fw:
        control = Control(net)
        control.client.sendall(f"PORT {comma(net.client.ipv4, 5000)}"[:9].encode())
        fw.wait_for_drop(reason="helper", dport=21)
        assert fw.json("flows", "--expected") == []


def test_ftplib_agrees(net: Network, public: Path) -> None:
    """A client of its own kind, for both directions of a transfer."""
    ftp_server(net.server, public, 21)
    with daemon(net.router, WITH):

        def listing() -> list[str]:
            with ftplib.FTP(timeout=10) as ftp:  # noqa: S321
                ftp.connect(net.server.ipv4, 21)
                ftp.login()
                ftp.set_pasv(False)
                active = ftp.nlst()
                ftp.set_pasv(True)
                return active + ftp.nlst()

        assert net.client.call(listing) == ["large", "large"]
