"""The screen of `conntrackd top`, driven by keys beside a real daemon."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from conntrackd.cli.topscreen import Confirm, TopScreen
from tests.lab.daemon import Daemon
from tests.lab.network import LabError, Network
from tests.lab.traffic import talk, tcp_pair, udp_socket

Driver = Coroutine[Any, Any, None]


def drive(app: TopScreen, keys: Callable[[Pilot[None]], Driver]) -> None:
    async def run() -> None:
        async with app.run_test(size=(160, 40)) as pilot:
            await until(pilot, lambda: app.leading)
            await keys(pilot)

    asyncio.run(run())


async def until(pilot: Pilot[None], condition: Callable[[], object]) -> None:
    """Wait until the screen is as it should be."""
    for _ in range(400):
        if condition():
            return
        await pilot.pause(0.05)
    raise LabError(f"waited in vain; the screen says {head(pilot)!r}")


def head(pilot: Pilot[None]) -> str:
    return str(pilot.app.screen_stack[0].query_one("#head", Static).content)


def message(pilot: Pilot[None]) -> str:
    return str(pilot.app.screen_stack[0].query_one("#message", Static).content)


def column(pilot: Pilot[None], name: str) -> list[str]:
    table = pilot.app.screen_stack[0].query_one(DataTable)
    labels = [str(each.label) for each in table.columns.values()]
    if name not in labels:
        return []
    return [str(table.get_row_at(row)[labels.index(name)]) for row in range(table.row_count)]


@pytest.fixture
def screen(net: Network, fw: Daemon) -> TopScreen:
    """A screen that shows a big TCP connection, a small one, and one of UDP."""
    for port, times in ((8000, 20), (8001, 1)):
        near, far = tcp_pair(net.client, net.server, 4, port)
        for _ in range(times):
            talk(near, far, bytes(10_000))
    udp_socket(net.client, 4).sendto(b"x", (net.server.ipv4, 5300))
    fw.flow("udp", dport=5300)
    return TopScreen(str(fw.socket_path), "", "flow", "bytes", 0.1)


def targets(pilot: Pilot[None]) -> list[str]:
    return [target.rpartition(":")[2] for target in column(pilot, "DESTINATION")]


def test_order_groups_and_filter(screen: TopScreen) -> None:
    async def keys(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: targets(pilot)[0] == "8000" and {"8001", "5300"} <= set(targets(pilot)))
        await pilot.press("f", *"udp", "enter")
        await until(pilot, lambda: targets(pilot) == ["5300"])
        assert "filter: udp" in head(pilot)
        await pilot.press("f", *" dport", "enter")
        await until(pilot, lambda: "dport" in message(pilot))
        await pilot.press("escape", "s")
        await until(pilot, lambda: "sorted by packets" in head(pilot))
        assert targets(pilot) == ["5300"]
        await pilot.press("g")
        await until(pilot, lambda: column(pilot, "SRC") == ["10.1.0.2"])
        await pilot.press("g", "g")
        await until(pilot, lambda: column(pilot, "ZONE") == ["lan > wan"])
        await pilot.press("g")
        await until(pilot, lambda: column(pilot, "RULE") == ["lan-to-wan"])

    drive(screen, keys)


def test_rates_and_pause(net: Network, screen: TopScreen) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 8002)

    async def keys(pilot: Pilot[None]) -> None:
        await pilot.press("s", "s", "s")
        await until(pilot, lambda: "sorted by rate" in head(pilot))

        def moving() -> bool:
            talk(near, far, bytes(30_000))
            return targets(pilot)[:1] == ["8002"] and column(pilot, "RATE")[0].endswith("/s")

        await until(pilot, moving)
        await pilot.press("p")
        await until(pilot, lambda: "PAUSED" in head(pilot))
        tcp_pair(net.client, net.server, 4, 8003)
        await pilot.pause(0.5)
        assert "8003" not in targets(pilot)
        await pilot.press("p")
        await until(pilot, lambda: "8003" in targets(pilot))
        assert "PAUSED" not in head(pilot)

    drive(screen, keys)


def test_kill_asks_first(fw: Daemon, screen: TopScreen) -> None:
    async def keys(pilot: Pilot[None]) -> None:
        def asked() -> bool:
            return isinstance(pilot.app.screen, Confirm)

        await until(pilot, lambda: targets(pilot)[:1] == ["8000"])
        await pilot.press("k")
        await until(pilot, asked)
        await pilot.press("n")
        await until(pilot, lambda: not asked())
        fw.flow("tcp", dport=8000)
        await pilot.press("k")
        await until(pilot, asked)
        await pilot.press("y")
        await until(pilot, lambda: targets(pilot) and "8000" not in targets(pilot))
        await pilot.press("g")
        await until(pilot, lambda: column(pilot, "SRC") == ["10.1.0.2"])
        await pilot.press("k")
        await until(pilot, asked)
        await pilot.press("y")
        await until(pilot, lambda: "ended: src host 10.1.0.2" in message(pilot))

    drive(screen, keys)
    assert not [flow for flow in fw.flows() if flow["orig"]["src"] == "10.1.0.2"]


def test_a_daemon_that_goes_away_is_told_and_found_again(fw: Daemon, screen: TopScreen) -> None:
    async def keys(pilot: Pilot[None]) -> None:
        fw.stop()
        await until(pilot, lambda: "not running" in message(pilot))
        fw.start()
        await until(pilot, lambda: "not running" not in message(pilot))

    drive(screen, keys)


def test_without_the_library_a_sentence(fw: Daemon) -> None:
    code = "import sys; sys.modules['textual'] = None; from conntrackd.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "top", "--socket", str(fw.socket_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'conntrackd[top]'" in done.stderr
    done = fw.cli("top", "--socket", "/nowhere", check=False)
    assert done.returncode == 3
