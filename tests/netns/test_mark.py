"""The packet mark between and after the hooks: ours says what we found, the rest is the user's."""

import pytest

from tests.lab.daemon import Daemon
from tests.lab.network import Network
from tests.lab.traffic import Arrivals, udp_socket

USERS = 0x03A5_5A5A  # every bit pattern outside of our mask
USERS_MASK = 0x03FF_FFFF

NEW = "0x20000000/0xe0000000"
ESTABLISHED = "0x40000000/0xe0000000"
REPLY = "0x10000000/0x10000000"
NOT_REPLY = "0x0/0x10000000"
UNCONFIRMED = "0x08000000/0x08000000"

TOOL = {4: "iptables-legacy", 6: "ip6tables-legacy"}


def hits(net: Network, family: int, table: str, chain: str) -> list[int]:
    """Packets that each rule of the chain matched."""
    rows = net.router.run(TOOL[family], "-t", table, "-nvxL", chain).stdout.splitlines()[2:]
    return [int(row.split()[0]) for row in rows]


def test_users_bits_survive_both_hooks(net: Network, fw: Daemon, family: int) -> None:
    # Set in front of the first queue, read behind the second: nft has a hook there.
    net.router.run(TOOL[family], "-t", "raw", "-I", "PREROUTING", "-p", "udp", "-j", "MARK",
                   "--set-xmark", f"{USERS:#x}/{USERS_MASK:#x}")  # fmt: skip
    net.router.run(
        "nft",
        "-f",
        "-",
        stdin=f"""
        table inet seen {{
            counter kept {{}}
            counter lost {{}}
            chain post {{
                type filter hook postrouting priority 300
                meta l4proto udp meta mark & {USERS_MASK:#x} == {USERS:#x} counter name kept return
                meta l4proto udp counter name lost
            }}
        }}""",
    )
    near, far = udp_socket(net.client, family), udp_socket(net.server, family, 5300)
    for _ in range(3):
        near.sendto(b"question", far.getsockname())
        far.recv(100)
        far.sendto(b"answer", near.getsockname())
        near.recv(100)
    counters = net.router.run("nft", "list", "counters").stdout
    assert "counter kept {\n\t\tpackets 6 " in counters, counters
    assert "counter lost {\n\t\tpackets 0 " in counters, counters
    assert fw.flow("udp", dport=5300)["reply"]["packets"] == 3


def test_forward_rules_can_match_our_classification(net: Network, fw: Daemon, family: int) -> None:
    for first, second in (NEW, UNCONFIRMED), (NEW, REPLY), (ESTABLISHED, REPLY), (ESTABLISHED, NOT_REPLY):
        net.router.run(TOOL[family], "-A", "FORWARD", "-p", "udp", "-m", "mark", "--mark", first,
                       "-m", "mark", "--mark", second)  # fmt: skip
    near, far = udp_socket(net.client, family), udp_socket(net.server, family, 5300)
    near.sendto(b"question", far.getsockname())
    far.recv(100)
    assert hits(net, family, "filter", "FORWARD") == [1, 0, 0, 0]
    far.sendto(b"answer", near.getsockname())
    near.recv(100)
    assert hits(net, family, "filter", "FORWARD") == [1, 0, 1, 0]
    near.sendto(b"thanks", far.getsockname())
    far.recv(100)
    assert hits(net, family, "filter", "FORWARD") == [1, 0, 1, 1]


def test_a_forward_rule_can_drop_by_our_classification(net: Network, fw: Daemon, family: int) -> None:
    """The user's rule refuses new connections; those that exist go on."""
    near, far = udp_socket(net.client, family), udp_socket(net.server, family, 5300)
    near.sendto(b"before", far.getsockname())
    far.recv(100)
    far.sendto(b"answer", near.getsockname())
    near.recv(100)
    net.router.run(TOOL[family], "-A", "FORWARD", "-m", "mark", "--mark", NEW, "-j", "DROP")

    arrivals = Arrivals(net.server)
    udp_socket(net.client, family).sendto(b"too late", far.getsockname())
    near.sendto(b"goes on", far.getsockname())
    assert far.recv(100) == b"goes on"
    assert not arrivals.having(b"too late")


@pytest.mark.parametrize("mark", ["0x0", "0x2a", "0xffffffff", "0xc0000001"])
def test_overwritten_mark_is_still_judged(net: Network, fw: Daemon, family: int, mark: str) -> None:
    net.router.run(TOOL[family], "-t", "mangle", "-A", "FORWARD", "-j", "MARK", "--set-mark", mark)
    near, far = udp_socket(net.client, family, 4000), udp_socket(net.server, family, 5300)
    arrivals = Arrivals(net.client)

    # What the policy refuses is refused, ...
    far.sendto(b"nobody asked", near.getsockname())
    drop = fw.wait_for_drop(protocol="udp", dport=4000)
    assert (drop["reason"], drop["rule"]) == ("policy", "default-forward")
    assert not arrivals.having(b"nobody asked")

    # ... what it admits is confirmed, counted once, and its answer passes.
    near.sendto(b"question", far.getsockname())
    assert far.recv(100) == b"question"
    far.sendto(b"answer", near.getsockname())
    assert near.recv(100) == b"answer"
    flow = fw.flow("udp", dport=5300)
    assert set(flow["status"]) == {"SEEN_REPLY", "CONFIRMED"}
    assert (flow["orig"]["packets"], flow["reply"]["packets"]) == (1, 1)
