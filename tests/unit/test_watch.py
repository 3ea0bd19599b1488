"""The operator is told in time that the table fills up, once per level, and what was refused."""

from structlog.testing import capture_logs

from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.watch import TableWatch


def said(watch: TableWatch) -> list[tuple[str, int]]:
    with capture_logs() as lines:
        watch.tick()
    return [(line["event"], line.get("percent", line.get("dropped"))) for line in lines]


def test_each_level_is_said_once_until_the_table_has_emptied() -> None:
    sysctl = Sysctl()
    sysctl.max = 1000
    net = Conntrack(sysctl)
    watch = TableWatch(net)
    heard = []
    for count in (0, 799, 800, 850, 790, 800, 950, 949, 960, 880, 951, 700, 810):
        net.table.count = count
        heard += said(watch)
    assert heard == [("table_filling", 80), ("table_filling", 95), ("table_filling", 95), ("table_filling", 81)]


def test_a_table_without_limit_never_fills() -> None:
    sysctl = Sysctl()
    sysctl.max = 0
    net = Conntrack(sysctl)
    net.table.count = 10_000_000
    assert said(TableWatch(net)) == []


def test_what_was_refused_is_said_once() -> None:
    net = Conntrack(Sysctl())
    watch = TableWatch(net)
    net.stats.table_full = 17
    assert said(watch) == [("table_full", 17)]
    assert said(watch) == []
    net.stats.table_full = 20
    assert said(watch) == [("table_full", 3)]
