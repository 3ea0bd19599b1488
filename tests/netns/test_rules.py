"""`conntrackd rules`: our chains come and go whole, and nothing else is touched."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network
from tests.lab.traffic import udp_socket

USERS_RULES = """\
*raw
:PREROUTING ACCEPT [0:0]
:USERS - [0:0]
-A PREROUTING -j USERS
-A USERS -p tcp -m tcp --dport 23 -j DROP
COMMIT
*mangle
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -p tcp -m tcp --dport 22 -j MARK --set-xmark 0x1/0x1
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
-A FORWARD -p tcp -m tcp --dport 25 -j REJECT
COMMIT
"""


@pytest.fixture(params=["legacy", "nft"])
def tool(request: pytest.FixtureRequest) -> str:
    """Runs the test with both backends of iptables."""
    return f"iptables-{request.param}"


@pytest.fixture
def idle(net: Network, tool: str) -> Iterator[Daemon]:
    """A daemon that is configured for the backend and does not run; the rules of a user are there."""
    for each in tool, tool.replace("ip", "ip6", 1):
        net.router.run(f"{each}-restore", stdin=USERS_RULES)
    with daemon(net.router, f'{POLICY}\n[rules]\niptables = "{tool}"\n', start=False) as idle:
        yield idle


def saved(net: Network, tool: str) -> str:
    """All rules of both families, without their counters and comments."""
    text = "".join(net.router.run(f"{each}-save").stdout for each in (tool, tool.replace("ip", "ip6", 1)))
    return re.sub(r"\[\d+:\d+\]", "", "\n".join(line for line in text.splitlines() if line[:1] != "#"))


def without_empty_tables(rules: str) -> str:
    """Tables that hold nothing but empty base chains: they come into being when somebody looks at them."""
    return re.sub(r"\*\w+\n(?::[A-Z]+ ACCEPT *\n)+COMMIT\n?", "", rules)


def test_install_is_idempotent_and_remove_is_complete(net: Network, idle: Daemon, tool: str) -> None:
    before = saved(net, tool)
    idle.install_rules()
    installed = saved(net, tool)
    assert installed.count("-j NFQUEUE --queue-num 0") == 4  # PREROUTING and OUTPUT of both families
    assert "-j NFQUEUE --queue-num 1" in installed
    assert "queue-bypass" not in installed

    idle.install_rules()
    assert saved(net, tool) == installed

    idle.remove_rules()
    assert without_empty_tables(saved(net, tool)) == without_empty_tables(before)
    idle.remove_rules()
    assert without_empty_tables(saved(net, tool)) == without_empty_tables(before)


def test_show_is_what_install_loads(net: Network, idle: Daemon, tool: str) -> None:
    shown = idle.cli("rules", "show", "--config", idle.config_path).stdout
    idle.install_rules()
    ours = {line for line in saved(net, tool).splitlines() if "CONNTRACKD" in line}
    assert {chain for line in ours for chain in re.findall(r"CONNTRACKD-\w+", line)} == set(
        re.findall(r"CONNTRACKD-\w+", shown)
    )
    assert shown.count("NFQUEUE") == saved(net, tool).count("NFQUEUE")


def test_bypass_comes_from_the_config(net: Network, idle: Daemon, tool: str) -> None:
    idle.write_config(f'{POLICY}\n[rules]\niptables = "{tool}"\n\n[queue]\nbypass = true\nnumbers = [7, 8]\n')
    idle.install_rules()
    queues = re.findall(r"NFQUEUE --queue-num (\d+)( --queue-bypass)?", saved(net, tool))
    assert {number for number, _ in queues} == {"7", "8"}
    assert all(bypass for _, bypass in queues)


def test_traffic_passes_with_both_backends(net: Network, idle: Daemon, family: int) -> None:
    idle.install_rules()
    idle.start()
    net.client.run("ping", "-n", "-c", "1", net.server.address(family))


def test_installing_again_under_traffic_loses_nothing(net: Network, fw: Daemon, family: int) -> None:
    near, far = udp_socket(net.client, family), udp_socket(net.server, family, 5300)
    installed = Event()

    def install() -> None:
        try:
            for _ in range(3):
                fw.install_rules()
        finally:
            installed.set()

    thread = Thread(target=install)
    thread.start()
    sent = 0
    while not installed.is_set() or not sent:
        payload = sent.to_bytes(4, "big")
        near.sendto(payload, far.getsockname())
        assert far.recv(100) == payload
        sent += 1
    thread.join()
    assert fw.flow("udp", dport=5300)["orig"]["packets"] == sent
    assert all((q.dropped_full, q.dropped_socket) == (0, 0) for q in fw.queues().values())


def test_several_at_once_install_one_jump(net: Network, idle: Daemon, tool: str) -> None:
    for _ in range(3):
        with ThreadPoolExecutor() as pool:
            done = [pool.submit(idle.cli, "rules", "install", "--config", idle.config_path) for _ in range(4)]
        assert not [each.exception() for each in done if each.exception()]
        jumps = re.findall(r"^-A [A-Z]+ .*-j (CONNTRACKD-\w+)$", saved(net, tool), re.MULTILINE)
        assert sorted(jumps) == sorted(2 * [f"CONNTRACKD-{name}" for name in ("PRE", "OUT", "POST", "IN")])
        idle.remove_rules()


def test_a_jump_that_is_doubled_or_displaced_is_put_back(net: Network, idle: Daemon, tool: str) -> None:
    idle.install_rules()
    installed = saved(net, tool)
    for each in (
        "-A PREROUTING -j CONNTRACKD-PRE",
        "-A USERS -g CONNTRACKD-PRE",
        "-I PREROUTING -p tcp -j CONNTRACKD-PRE",
    ):
        net.router.run(tool, "-t", "raw", *each.split())
    idle.install_rules()
    assert saved(net, tool) == installed
    net.router.run(tool, "-t", "raw", "-I", "PREROUTING", "2", "-p", "tcp", "-j", "ACCEPT")
    idle.install_rules()
    assert re.findall(r"^-A PREROUTING .*-j (\S+)$", saved(net, tool), re.MULTILINE)[:3] == [
        "USERS", "CONNTRACKD-PRE", "ACCEPT",
    ]  # fmt: skip
