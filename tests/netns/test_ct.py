"""`conntrackd ct` beside conntrack(8): in one router the kernel and the daemon track the same packets."""

import contextlib
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from tests.differential import packets
from tests.lab import daemon as lab
from tests.lab.daemon import Daemon, daemon
from tests.lab.network import Network, Process, network, wait_until
from tests.lab.programs import program
from tests.lab.traffic import AF, Arrivals, inject, tcp_pair, udp_socket
from tests.netns.test_helpers_ftp import WITH, Control, comma
from tests.unit.client import conntrackd_here
from tests.unit.craft import sctp_init

# What each tracker has of its own: time that passes, numbers, and who asked.
OWN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^((?:\[[\d.]+\]\t)?(?: *\[[A-Z]+\] )?(?:ipv\d +\d+ )?\w+ +\d+) \d+ ", r"\1 TIME "),
        (r"^\d+ (?=proto=)", "TIME "),
        (r"delta-time=\d+", "delta-time=AGE"),
        (r"\buse=\d+", "use=N"),
        (r"\bid=\d+(?= \[USERSPACE\]| labels=|$)", "id=ID"),
        (r"\[(start|stop)=[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d [\d:]{8} \d{4}\]", r"[\1=TIME]"),
        (r"^\[\d+\.\d{6}\]\t", "[NOW]\t"),
        (r" \[USERSPACE\].*", " [USERSPACE]"),
        (r"^(-[ADU]) -t \d+", r"\1 -t TIME"),
        (r"<timeout>\d+</timeout>", "<timeout>TIME</timeout>"),
        (r"<deltatime>\d+</deltatime>", "<deltatime>AGE</deltatime>"),
        (r"<(use|id|start|stop)>\d+</", r"<\1>N</"),
    )
]
TRACKING = """
table inet oracle {
  ct helper ftp { type "ftp" protocol tcp; }
  chain early { type filter hook prerouting priority -150; tcp dport 21 ct helper set "ftp"; }
  chain on { type filter hook forward priority 0; ct state invalid counter; }
}
"""
# Nothing that is here at the beginning of a test may be gone before its end.
LONG = (
    "udp_timeout", "icmp_timeout", "icmpv6_timeout", "gre_timeout", "sctp_timeout_cookie_wait", "tcp_timeout_syn_sent",
    "tcp_timeout_time_wait",
)  # fmt: skip
TIMEOUTS = "[conntrack]\n" + "".join(f'{name} = "10m"\n' for name in LONG)
POLICY = lab.POLICY + TIMEOUTS
MARKED = POLICY.replace('to = "wan"\naction = "accept"', 'to = "wan"\naction = "accept"\nmark = 42', 1)
ESP, GRE, DCCP = 50, 47, 33
INIT, INIT_ACK = 1, 2
KNOCK = 99  # the port of what is sent only to see who listens
KNOCKED = re.compile(r"dport(?:=|>| )99\b")


def plain(text: str) -> list[str]:
    """The lines of an output without what is each tracker's own, in an order of their own."""
    lines = []
    for line in text.splitlines():
        for pattern, replacement in OWN:
            line = pattern.sub(replacement, line)
        lines.append(line)
    return sorted(lines)


class Twin(NamedTuple):
    """A network whose router has both trackers."""

    net: Network
    fw: Daemon

    def kernel(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.net.router.run("conntrack", *words, check=False)

    def ours(self, *words: str) -> subprocess.CompletedProcess[str]:
        return conntrackd_here(*self.fw.command("ct", *words)[1:])

    def settle(self, count: int) -> None:
        """Wait until both list so many connections, and the same: no packet is on its way that one has not seen."""

        def settled() -> bool:
            kernel, ours = plain(self.kernel("-L").stdout), plain(self.ours("-L").stdout)
            return len(kernel) == count and kernel == ours

        wait_until(settled, f"both list {count} connections")

    def both(self, *words: str) -> list[str]:
        """The lines that both print for these words, which are the same, as are the remark and the exit code."""
        for _ in range(50 if words[0] == "-L" else 1):  # a late ACK may come between the two
            kernel, ours = self.kernel(*words), self.ours(*words)
            if plain(ours.stdout) == plain(kernel.stdout):
                break
        assert plain(ours.stdout) == plain(kernel.stdout)
        assert ours.stderr == kernel.stderr
        assert ours.returncode == kernel.returncode
        return ours.stdout.splitlines()


@contextlib.contextmanager
def twin(config: str = POLICY) -> Iterator[Twin]:
    with network() as net:
        for name in "acct", "timestamp":
            net.router.sysctl(f"net/netfilter/nf_conntrack_{name}", 1)
        for name in LONG:
            net.router.sysctl(f"net/netfilter/nf_conntrack_{name}", 600)
        net.router.run("nft", "-f", "-", stdin=TRACKING)
        with daemon(net.router, config) as fw:
            yield Twin(net, fw)


def udp_exchange(net: Network, family: int, port: int, replies: int) -> None:
    server, client = udp_socket(net.server, family, port), udp_socket(net.client, family)
    for _ in range(max(replies, 1)):
        client.sendto(b"question", (net.server.address(family), port))
        _, source = server.recvfrom(100)
        if replies:
            server.sendto(b"answer", source)
            client.recv(100)


def everything(net: Network, family: int) -> None:
    """One connection of each kind that the trackers know."""
    server = net.server.address(family)
    tcp_pair(net.client, net.server, family, 7)  # stays open
    near, far = tcp_pair(net.client, net.server, family, 8)
    near.close()
    assert far.recv(1) == b""
    far.close()
    net.server.run(
        "iptables-legacy" if family == 4 else "ip6tables-legacy",
        "-A",
        "INPUT",
        "-p",
        "tcp",
        "--dport",
        "25",
        "-j",
        "DROP",
    )
    unanswered = net.client.open_socket(AF[family], socket.SOCK_STREAM)
    unanswered.setblocking(False)
    unanswered.connect_ex((server, 25))
    unanswered.close()  # it would send its SYN again
    udp_exchange(net, family, 9, 3)
    udp_exchange(net, family, 10, 0)
    net.client.run("ping", f"-{family}", "-c1", "-W5", server)
    near_ip, far_ip = (socket.inet_pton(AF[family], host.address(family)) for host in (net.client, net.server))
    lite = packets.udplite(near_ip, far_ip, 5000, 11, b"lite")
    init, init_ack = ((packets.chunk(kind, 0, sctp_init(tag)),) for kind, tag in ((INIT, 5), (INIT_ACK, 6)))
    inject(net.client, (packets.ip(near_ip, far_ip, number, bytes(16)) for number in (ESP, GRE, DCCP)))
    inject(net.client, [packets.ip(near_ip, far_ip, socket.IPPROTO_UDPLITE, lite)])
    question = packets.ip(near_ip, far_ip, socket.IPPROTO_SCTP, packets.sctp(5000, 12, 0, init))
    arrived = Arrivals(net.server)
    inject(net.client, [question])
    arrived.wait_for(question[-20:])
    arrivals = Arrivals(net.client)
    answer = packets.ip(far_ip, near_ip, socket.IPPROTO_SCTP, packets.sctp(12, 5000, 5, init_ack))
    inject(net.server, [answer])
    arrivals.wait_for(answer[-20:])


@pytest.fixture(scope="module")
def both() -> Iterator[Twin]:
    """Both trackers after one connection of each kind over IPv4 and IPv6."""
    with twin() as this:
        for family in 4, 6:
            everything(this.net, family)
        this.settle(22)
        yield this


@pytest.mark.parametrize("output", ["", "extended", "id", "ktimestamp", "timestamp", "extended,id,ktimestamp"])
def test_the_list(both: Twin, output: str) -> None:
    lines = both.both("-L", *(("-o", output) if output else ()))
    assert len(lines) == 22


def test_the_list_with_labels(both: Twin) -> None:
    """The tool misses its file of names, which we do not need (docs/ct.md)."""
    kernel, ours = both.kernel("-L", "-o", "labels"), both.ours("-L", "-o", "labels")
    assert plain(ours.stdout) == plain(kernel.stdout)
    assert kernel.stderr == f"nfct_labelmap_new: No such file or directory\n{ours.stderr}"


def test_the_list_to_load_again(both: Twin) -> None:
    assert len(both.both("-L", "-o", "save")) == 22


def icmp_and_sctp_as_they_are(lines: list[str]) -> list[str]:
    """What the tool leaves out for ICMP and mistakes for TCP in SCTP, and we do not (docs/ct.md)."""
    out = []
    for line in lines:
        line = re.sub(r"<type>\d+</type><code>\d+</code><id>N</id>", "", line)
        out.append(re.sub(r'("sctp".*)<state>\w+</state>', r"\1<state>SCTP</state>", line))
    return out


@pytest.mark.parametrize("output", ["xml", "xml,ktimestamp", "xml,extended,id"])
def test_the_list_as_xml(both: Twin, output: str) -> None:
    kernel, ours = both.kernel("-L", "-o", output), both.ours("-L", "-o", output)
    assert icmp_and_sctp_as_they_are(plain(ours.stdout)) == icmp_and_sctp_as_they_are(plain(kernel.stdout))
    assert ours.stderr == kernel.stderr
    assert ours.stdout.splitlines()[:2] == kernel.stdout.splitlines()[:2]
    assert len(ElementTree.fromstring(ours.stdout).findall("flow")) == 22  # noqa: S314 - it is ours


@pytest.mark.parametrize(
    "words",
    [
        ("-p", "tcp"),
        ("-p", "6", "--state", "ESTABLISHED"),
        ("-p", "tcp", "--state", "SYN_SENT"),
        ("-p", "tcp", "--dport", "7"),
        ("-p", "tcp", "--orig-port-dst", "7", "-f", "ipv6"),
        ("-p", "udp", "--reply-port-src", "9"),
        ("-p", "udp", "--reply-port-dst", "9"),
        ("-p", "UDP", "-d", "10.2.0.0/16"),
        ("-p", "udplite", "--sport", "5000"),
        ("-p", "sctp", "--dport", "12", "--state", "COOKIE_WAIT"),
        ("-p", "icmp", "--icmp-type", "8"),
        ("-p", "icmp", "--icmp-type", "13"),
        ("-p", "icmpv6", "--icmpv6-type", "128", "--icmpv6-code", "0"),
        ("-p", "gre", "--srckey", "0", "--dstkey", "0"),
        ("-p", "50"),
        ("-p", "esp"),
        ("-s", "10.1.0.2"),
        ("-s", "10.1.0.3"),
        ("-d", "fd00:2::2"),
        ("-s", "fd00:1::/32"),
        ("-d", "10.2.0.0/24", "-s", "10.0.0.0/8"),
        ("-s", "10.9.0.9", "--mask-src", "255.0.255.0"),
        ("--src", "10.77.0.2", "--mask-src", "255.0.255.255"),
        ("-r", "10.2.0.2", "-q", "10.1.0.2"),
        ("-q", "fd00:1::2"),
        ("-f", "ipv4"),
        ("-f", "ipv6"),
        ("-u", "ASSURED"),
        ("-u", "SEEN_REPLY"),
        ("-u", "SEEN_REPLY,ASSURED"),
        ("-u", "UNREPLIED"),
        ("-m", "0"),
        ("-m", "1"),
        ("-m", "0x0/0xff"),
        ("-m", "3/1"),
        ("-w", "0"),
        ("-w", "7"),
        ("--src-nat",),
        ("-g",),
        ("-j", "192.0.2.1"),
        ("-n", "192.0.2.1:80"),
        ("-p", "udp", "-o", "extended,id", "-f", "ipv4"),
    ],
    ids=" ".join,
)
def test_the_options_choose_the_same(both: Twin, words: tuple[str, ...]) -> None:
    both.both("-L", *words)


@pytest.mark.parametrize(
    "words",
    [
        ("-L", "-p", "foo"),
        ("-L", "-p", "tcp", "--state", "FOO"),
        ("-L", "-o", "json"),
        ("-L", "-s", "10.0.0.256"),
        ("-L", "-s", "10.0.0.0/99"),
        ("-L", "-r", "10.0.0.0/8"),
        ("-L", "-s", "10.1.0.2", "-d", "fd00:2::2"),
        ("-L", "-f", "foo"),
        ("-L", "foo"),
        ("-L", "-e", "NEW"),
        ("-L", "-u", "FOO"),
        ("-L", "-j", "10.1.0.2", "-n"),
        ("-E", "-e", "FOO"),
        ("-C", "-s", "10.1.0.2"),
        ("-F", "-s", "10.1.0.2"),
        ("-G", "-p", "tcp"),
        ("-G", "-s", "10.1.0.2", "-d", "10.2.0.2"),
        ("-G", "-p", "tcp", "-s", "10.1.0.2", "-d", "10.2.0.2", "--sport", "7"),
        ("-L", "expect", "-s", "10.1.0.2"),
        ("-L", "--mask-src", "255.0.0.0"),
    ],
    ids=" ".join,
)
def test_the_same_is_refused_with_the_same_sentence(both: Twin, words: tuple[str, ...]) -> None:
    kernel, ours = both.kernel(*words), both.ours(*words)
    assert ours.stderr.splitlines()[0] == kernel.stderr.splitlines()[0]
    assert (ours.returncode, ours.stdout) == (kernel.returncode, "") == (2, "")


def test_counts(both: Twin) -> None:
    assert both.both("-C") == [str(len(both.ours("-L").stdout.splitlines()))]
    assert both.both("-C", "expect") == ["0"]
    assert both.both("-L", "expect") == []
    for table in (), ("expect",):
        (ours,), kernel = both.ours("-S", *table).stdout.splitlines(), both.kernel("-S", *table).stdout.splitlines()
        numbers = re.compile(r"\d+(?= )")
        assert numbers.sub("N", ours) == numbers.sub("N", kernel[0])
    assert "insert=22 " in both.ours("-S").stdout


def test_exactly_one(both: Twin) -> None:
    (line,) = both.both("-L", "-p", "tcp", "--dport", "7", "-f", "ipv4")
    sport = re.findall(r"sport=(\d+)", line)[0]
    tuple_ = ["-s", "10.1.0.2", "-d", "10.2.0.2", "-p", "tcp", "--sport", sport, "--dport"]
    assert len(both.both("-G", *tuple_, "7")) == 1
    assert both.both("-G", *tuple_, "8") == []
    assert both.ours("-G", *tuple_, "8").returncode == 1


def follow(this: Twin, *words: str) -> tuple[Process, Process]:
    """Begin to follow events with both; each has seen one when this returns."""
    both = this.net.router.start("conntrack", "-E", *words), this.net.router.start(*this.fw.command("ct", "-E", *words))

    def heard() -> bool:
        knock = udp_socket(this.net.client, 4)
        knock.sendto(b"knock", (this.net.server.ipv4, KNOCK))
        knock.close()
        return all(KNOCKED.search(process.output()) for process in both)

    wait_until(heard, "both hear of events")
    return both


# The original tuple in an event, in each format.
ORIGINAL = re.compile(
    r"src=\S+ dst=\S+(?: (?:sport|dport|type|code|id|srckey|dstkey)=\S+)*"
    r"|<src>.*?</layer4>"
    r"|-s \S+ -d \S+ |-p \S+(?: --(?:sport|dport|srckey|dstkey|icmp\S+) \S+)*"
)


def by_connection(output: str) -> dict[str, list[str]]:
    """The lines of an output by the connection that they are about, as they came; not those that `follow` made."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        (line,) = icmp_and_sctp_as_they_are(plain(line))
        # The tool says, too, who has deleted the connection: then it is no XML, and can't be loaded.
        line = re.sub(r"(</flow>|^-D .*) \[USERSPACE\]", r"\1", line)
        key = "".join(ORIGINAL.findall(line)[: 2 if " -s " in line else 1])
        if key and not KNOCKED.search(line):
            found.setdefault(key, []).append(line)
    return found


@pytest.mark.parametrize("output", ["timestamp,extended,id", "xml,ktimestamp", "save", "ktimestamp"])
def test_events_of_whole_lives(output: str) -> None:
    """From the first packet to the end, be it by a FIN, by a RST, or by the operator."""
    with twin() as this:
        both = follow(this, "-o", output)
        everything(this.net, 4)
        everything(this.net, 6)
        with pytest.raises(ConnectionRefusedError):
            refused(this.net)
        this.settle(22 + knocks(this))
        for delete in this.kernel, this.ours:
            assert delete("-D", "-p", "tcp", "--dport", "7").returncode == 0
        for process in both:
            wait_until(lambda: ends(process.output()) == 3, "the end of all three is told")  # noqa: B023
        for process in both:
            process.signal(signal.SIGINT)
            assert process.wait() == 0
        kernel, ours = (process.output() for process in both)
        assert re.search(r"\): \d+ flow events have been shown\.\n$", ours)
        expected, got = by_connection(kernel), by_connection(ours)
        assert got.keys() == expected.keys()
        for key, lines in expected.items():
            assert got[key] == lines, key


def refused(net: Network) -> None:
    near = net.client.open_socket(socket.AF_INET, socket.SOCK_STREAM)
    near.connect((net.server.ipv4, 1))


def knocks(this: Twin) -> int:
    return len(this.ours("-L", "-p", "udp", "--dport", str(KNOCK)).stdout.splitlines())


def ends(output: str) -> int:
    return len(re.findall(r'\[DESTROY\]|type="destroy"|^-D ', output, re.MULTILINE))


def test_only_the_events_that_are_asked_for_and_marks() -> None:
    with twin(MARKED) as this:
        this.net.router.run("nft", "add rule inet oracle early ct mark set 42")
        both = follow(this, "-e", "NEW,DESTROY", "-p", "udp", "-o", "timestamp,extended")
        udp_exchange(this.net, 4, 9, 3)
        tcp_pair(this.net.client, this.net.server, 4, 7)
        this.settle(2 + knocks(this))
        for delete in this.kernel, this.ours:
            assert delete("-D", "-p", "udp", "--dport", "9", "-m", "42").returncode == 0
        for process in both:
            wait_until(lambda: ends(process.output()), "the end is told")  # noqa: B023
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
        kernel, ours = (by_connection(process.output()) for process in both)
        assert ours == kernel
        ((new, destroyed),) = ours.values()
        assert (new.split()[:2], destroyed.split()[:2]) == (["[NOW]", "[NEW]"], ["[NOW]", "[DESTROY]"])
        assert " mark=42" in new
        assert " mark=42 " in destroyed


def test_an_end_by_time_has_no_timeout() -> None:
    with twin(lab.POLICY + '[conntrack]\nudp_timeout = "1s"\n') as this:
        this.net.router.sysctl("net/netfilter/nf_conntrack_udp_timeout", 1)
        both = follow(this)
        sender = udp_socket(this.net.client, 4)

        def lines(process: Process) -> set[str]:
            return set(chain(*by_connection(process.output()).values()))

        def told() -> bool:
            # The kernel notices that an entry is over when it is looked up the next time.
            sender.sendto(b"nobody listens", (this.net.server.ipv4, 9))
            return all(any("[DESTROY]" in line for line in lines(process)) for process in both)

        wait_until(told, "both tell the end", 60.0, pause_s=1.5)
        for process in both:
            process.signal(signal.SIGINT)
            process.wait()
        kernel, ours = map(lines, both)
        assert ours == kernel
        assert any(line.startswith(f"[DESTROY] udp      17 src={this.net.client.ipv4} ") for line in ours)


def test_deletion() -> None:
    with twin() as this:
        for family in 4, 6:
            for port in 7, 8:
                tcp_pair(this.net.client, this.net.server, family, port)
            udp_exchange(this.net, family, 9, 3)
        this.settle(6)
        assert len(this.both("-D", "-p", "tcp", "--dport", "7", "-f", "ipv6", "-o", "extended,id")) == 1
        assert this.both("-D", "-p", "tcp", "--dport", "7", "-f", "ipv6") == []
        assert this.ours("-D", "-p", "tcp", "--dport", "7", "-f", "ipv6").returncode == 1
        # What the daemon's filters can't say is looked for here.
        assert this.both("-D", "-p", "icmp", "--icmp-type", "8") == []
        this.net.client.run("ping", "-4", "-c1", this.net.server.ipv4)
        this.settle(6)
        assert len(this.both("-D", "-p", "icmp", "--icmp-type", "8")) == 1
        assert len(this.both("-D", "-s", this.net.client.ipv4, "-o", "save")) == 3
        assert this.both("-D", "-d", this.net.client.ipv4) == []
        assert {flow["family"] for flow in this.fw.flows()} == {"ipv6"}
        assert len(this.fw.flows()) == 2
        assert this.both("-F", "-f", "ipv4") == []
        assert len(this.fw.flows()) == 2
        assert this.both("-F") == []
        assert this.both("-C") == ["0"]
        assert this.both("-L", "-o", "xml") == []


@pytest.fixture
def ftp() -> Iterator[Twin]:
    with twin(WITH + TIMEOUTS) as this:
        yield this


def test_what_helpers_expect(ftp: Twin) -> None:
    control = Control(ftp.net)
    ftp.settle(1)
    assert "helper=ftp" in ftp.both("-L")[0]
    control.say(control.server, f"227 Entering Passive Mode ({comma(ftp.net.server.ipv4, 5000)}).")
    for output in (), ("-o", "extended"), ("-f", "ipv4"):
        (line,) = ftp.both("-L", "expect", *output)
        assert line.endswith("sport=" + line.split("sport=")[3].split()[0] + " dport=21 class=0 helper=ftp")
    assert ftp.both("-C", "expect") == ["1"]
    tcp_pair(ftp.net.client, ftp.net.server, 4, 5000)
    ftp.settle(2)
    assert ftp.both("-L", "expect") == []
    (saved,) = ftp.both("-L", "-p", "tcp", "--dport", "5000", "-o", "save")
    assert " -u EXPECTED,SEEN_REPLY,ASSURED " in saved
    assert len(ftp.both("-L", "-u", "EXPECTED")) == 1


def test_conntrack_loads_what_is_saved(tmp_path: Path) -> None:
    """The first consumer: `conntrack -R`, into the empty table of another kernel; the marks come with it."""
    with twin(MARKED) as this:
        for family in 4, 6:
            everything(this.net, family)
        wait_until(lambda: len(this.fw.flows()) == 22, "the daemon has all connections")
        lines = [line for line in this.ours("-L", "-o", "save").stdout.splitlines() if " -p dccp" not in line]
        assert len(lines) == 20
        other = this.net.add_host("other", "dmz")
        loaded = other.run("conntrack", "-R", "-", stdin="\n".join(lines))
        assert loaded.stdout == ""
        there = plain(other.run("conntrack", "-L", "-o", "save").stdout)
        assert there == [line.replace(" -m 42", "") for line in plain("\n".join(lines))]
        assert len(other.run("conntrack", "-L", "-m", "42").stdout.splitlines()) == 20


def test_munin_counts_the_same(both: Twin, tmp_path: Path) -> None:
    """The second consumer: munin's plugin, with ours in the place of conntrack(8) as its user would put it there."""
    plugin = program("usr/share/munin/plugins/fw_conntrack")
    shim = tmp_path / "conntrack"
    shim.write_text(f'#!/bin/sh\nexec {" ".join(both.fw.command("ct"))} "$@"\n')
    shim.chmod(0o755)
    env = {"PERL5LIB": str(program("usr/share/perl5"))}
    kernel = both.net.router.run("perl", plugin, env=env).stdout
    in_place = f"mount --bind {shim} /usr/sbin/conntrack && exec perl {plugin}"
    ours = both.net.router.run("unshare", "--mount", "sh", "-c", in_place, env=env).stdout
    assert ours == kernel
    assert {"established.value 2", "time_wait.value 2", "syn_sent.value 2", "total.value 22"} < set(ours.splitlines())


def test_habits(both: Twin) -> None:
    """What stands in the runbooks, word for word, in a shell."""

    def shell(line: str) -> str:
        ct = " ".join(both.fw.command("ct"))
        return both.net.router.run(
            "sh", "-c", f'conntrackd_ct() {{ {ct} "$@"; }}; {line.replace("CT", "conntrackd_ct")}'
        ).stdout

    assert shell("CT -L | wc -l") == "22\n"
    assert shell("CT -L 2>/dev/null | head -n 3 | wc -l") == "3\n"
    states = shell("CT -L -p tcp 2>/dev/null | awk '{print $4}' | sort | uniq -c | sort -rn")
    assert sorted(states.split()) == ["2", "2", "2", "ESTABLISHED", "SYN_SENT", "TIME_WAIT"]
    heavy = "CT -L 2>/dev/null | grep -o 'src=[^ ]*' | sort | uniq -c | sort -rn | head -n 1"
    assert shell(heavy).split()[0] == "11"
    assert shell("CT -D -s 192.0.2.1 || true") == ""
    assert shell("CT -S | grep -o 'insert_failed=[0-9]*'") == "insert_failed=0\n"
    assert shell("CT -C") == "22\n"
    assert shell("CT -V") == "conntrack v1.4.7 (conntrack-tools)\n"
