from itertools import pairwise

import pytest

from conntrackd.const import IPS_CONFIRMED, IPS_DYING
from conntrackd.core.conn import Conn, refresh
from conntrackd.core.ecache import EventRing
from conntrackd.core.stats import Stats
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.table import GC_HORIZON_MS, GC_PAUSE_MS, GC_SLICE, Table
from conntrackd.core.tuples import invert

NOW = 5_000_500  # ms; in the middle of a second
UNCONFIRMED_TIMEOUT = Sysctl().unconfirmed_timeout


def connection(number: int, timeout_ms: int = 30_000) -> Conn:
    """An unconfirmed UDP connection, another one for each number."""
    orig = bytes((17, 10, 0, 0, 1, 10, 0, 0, 2)) + number.to_bytes(4, "big")
    ct = Conn(orig, invert(orig), 17, NOW)
    refresh(ct, timeout_ms, NOW)
    return ct


def inserted(table: Table, number: int, timeout_ms: int = 30_000, now_ms: int = NOW) -> Conn:
    ct = connection(number, timeout_ms)
    table.insert(ct, now_ms)
    return ct


def entries(table: Table) -> int:
    return sum(map(len, table.shards))


def on_wheel(table: Table) -> list[Conn]:
    """Every connection that gc will look at, as often as it will."""
    found = []
    for slot in table.wheel:
        ct = slot.later
        while ct is not None and ct is not slot:
            found.append(ct)
            ct = ct.later
    return found


def sweep(table: Table, now_ms: int) -> int:
    """Run gc until it wants to pause; returns how many turns it took."""
    turns = 1
    while table.gc(now_ms) <= now_ms:
        turns += 1
    return turns


@pytest.fixture
def table() -> Table:
    return Table(Sysctl(), Stats(), EventRing(8))


def test_a_confirmed_connection_is_found_by_both_tuples(table: Table) -> None:
    ct = inserted(table, 1)
    assert table.find(ct.orig, NOW) is ct
    assert table.find(ct.reply, NOW) is ct
    assert (table.count, table.stats.insert) == (1, 1)
    assert ct.status & IPS_CONFIRMED


def test_connections_get_different_ids(table: Table) -> None:
    ids = {inserted(table, number).id for number in range(10)}
    assert len(ids) == 10
    assert 0 not in ids  # 0 means: not confirmed


def test_the_timeout_runs_from_the_confirm_on(table: Table) -> None:
    ct = connection(1, timeout_ms=30_000)
    table.insert(ct, NOW + 700)
    assert ct.expires_ms == NOW + 700 + 30_000


def test_a_connection_is_found_until_the_millisecond_it_expires(table: Table) -> None:
    ct = inserted(table, 1, timeout_ms=1000)
    assert table.find(ct.reply, NOW + 999) is ct
    assert table.find(ct.reply, NOW + 1000) is None


def test_a_lookup_that_meets_an_expired_connection_ends_it(table: Table) -> None:
    ct = inserted(table, 1, timeout_ms=1000)
    table.find(ct.orig, NOW + 1000)
    assert not list(table.connections())
    assert (table.count, table.stats.destroyed) == (0, 1)
    assert ct.status & IPS_DYING


def test_a_killed_connection_is_gone_under_both_tuples_and_counted_once(table: Table) -> None:
    ct = inserted(table, 1)
    other = inserted(table, 2)
    table.kill(ct, NOW)
    table.kill(ct, NOW)
    assert table.find(ct.orig, NOW) is None
    assert table.find(ct.reply, NOW) is None
    assert table.find(other.orig, NOW) is other
    assert (table.count, table.stats.destroyed) == (1, 1)


def test_a_connection_that_answers_itself_enters_and_leaves_as_one(table: Table) -> None:
    orig = bytes((17, 10, 0, 0, 1, 10, 0, 0, 1)) + bytes((0, 53, 0, 53))
    ct = Conn(orig, invert(orig), 17, NOW)
    refresh(ct, 30_000, NOW)
    assert ct.orig == ct.reply
    table.insert(ct, NOW)
    assert (table.count, entries(table)) == (1, 1)
    table.kill(ct, NOW)
    assert (table.count, entries(table)) == (0, 0)


def test_a_tuple_that_is_taken_cannot_be_inserted_again(table: Table) -> None:
    inserted(table, 1)
    with pytest.raises(AssertionError):
        table.insert(connection(1), NOW)


# --- Unconfirmed connections ------------------------------------------------------------------------------------


def test_an_unconfirmed_connection_is_not_in_the_table(table: Table) -> None:
    ct = connection(1)
    table.hold_unconfirmed(ct, NOW)
    assert table.find(ct.orig, NOW) is None
    assert table.find_unconfirmed(ct.orig) is ct
    assert table.find_unconfirmed(ct.reply) is None  # its answer cannot come before it has left
    assert (table.count, table.stats.insert, table.stats.created) == (0, 0, 1)


def test_killing_an_unconfirmed_connection_lets_go_of_it(table: Table) -> None:
    ct = connection(1)
    table.hold_unconfirmed(ct, NOW)
    table.kill(ct, NOW)
    assert table.find_unconfirmed(ct.orig) is None
    assert table.stats.destroyed == 0  # it was never there for others


@pytest.mark.parametrize("rotations", [0, 1])
def test_an_unconfirmed_connection_can_be_let_go_of_in_either_generation(table: Table, rotations: int) -> None:
    ct = connection(1)
    table.hold_unconfirmed(ct, NOW)
    for _ in range(rotations):
        table.rotate(NOW)
    assert table.find_unconfirmed(ct.orig) is ct
    table.drop_unconfirmed(ct)
    assert table.find_unconfirmed(ct.orig) is None
    assert table.unconfirmed_count() == 0


def test_an_unconfirmed_connection_lives_through_one_rotation_and_not_two(table: Table) -> None:
    ct = connection(1)
    table.hold_unconfirmed(ct, NOW)
    table.rotate(NOW)
    assert table.find_unconfirmed(ct.orig) is ct
    assert table.stats.unconfirmed_expired == 0
    table.rotate(NOW)
    assert table.find_unconfirmed(ct.orig) is None
    assert table.stats.unconfirmed_expired == 1


def test_gc_forgets_unconfirmed_connections_between_half_of_their_time_and_all_of_it(table: Table) -> None:
    table.rotated_ms = NOW
    ct = connection(1)
    table.hold_unconfirmed(ct, NOW)
    table.gc(NOW + UNCONFIRMED_TIMEOUT // 2 - 1)
    assert table.rotated_ms == NOW
    table.gc(NOW + UNCONFIRMED_TIMEOUT // 2)
    assert table.find_unconfirmed(ct.orig) is ct
    table.gc(NOW + UNCONFIRMED_TIMEOUT)
    assert table.find_unconfirmed(ct.orig) is None


def test_unconfirmed_connections_are_capped_and_the_oldest_go_first(table: Table) -> None:
    limit = table.sysctl.unconfirmed_max = 10
    held = [connection(number) for number in range(100)]
    for ct in held:
        table.hold_unconfirmed(ct, NOW)
        assert table.find_unconfirmed(ct.orig) is ct
        assert table.unconfirmed_count() <= limit
    left = [ct for ct in held if table.find_unconfirmed(ct.orig) is ct]
    assert left == held[-len(left) :]
    assert len(left) >= limit // 2
    assert table.stats.unconfirmed_expired == len(held) - len(left)


# --- Garbage collection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_ms", [1, 999, 1000, 59_999, GC_HORIZON_MS, 120_000, 3_600_000])
def test_gc_ends_what_has_expired_within_its_pause_and_nothing_before(table: Table, timeout_ms: int) -> None:
    """As long as nobody shortens the timeout, the slot is that of the expiry."""
    ct = inserted(table, 1, timeout_ms)
    now_ms = NOW
    while table.count:
        assert now_ms <= NOW + timeout_ms + 2 * GC_PAUSE_MS
        now_ms = table.gc(now_ms)
        assert table.count or now_ms >= ct.expires_ms


def test_gc_ends_within_the_horizon_what_was_shortened(table: Table) -> None:
    ct = inserted(table, 1, timeout_ms=432_000_000)
    refresh(ct, 10, NOW)
    sweep(table, NOW + GC_HORIZON_MS + 2 * GC_PAUSE_MS)
    assert table.count == 0


def test_gc_spares_what_was_refreshed(table: Table) -> None:
    ct = inserted(table, 1, timeout_ms=10_000)
    refresh(ct, 30_000, NOW + 9_000)
    sweep(table, NOW + 20_000)
    assert table.find(ct.orig, NOW + 20_000) is ct
    sweep(table, NOW + 41_000)
    assert table.count == 0


def test_gc_forgets_what_was_killed_before_it_came(table: Table) -> None:
    table.kill(inserted(table, 1, timeout_ms=1000), NOW)
    sweep(table, NOW + 3_000)
    assert table.stats.destroyed == 1
    assert not on_wheel(table)


def test_gc_looks_at_a_bounded_number_of_connections_in_one_turn(table: Table) -> None:
    for number in range(3 * GC_SLICE):
        inserted(table, number, timeout_ms=1000)
    after = NOW + 10_000
    left = [3 * GC_SLICE]
    while table.gc(after) == after:  # come again at once
        left.append(table.count)
    assert [before - now for before, now in pairwise(left)] == [GC_SLICE] * (len(left) - 1)
    assert len(left) > 2
    assert table.count == 0


def test_gc_looks_at_a_living_connection_once_per_horizon(table: Table) -> None:
    """However often it is refreshed: each look moves it to another slot of the wheel."""
    ct = inserted(table, 1, timeout_ms=432_000_000)
    slot, moves = ct.later, 0
    for second in range(1, 3 * GC_HORIZON_MS // 1000):
        now_ms = NOW + second * 1000
        refresh(ct, 432_000_000, now_ms)
        table.gc(now_ms)
        assert on_wheel(table) == [ct]
        moves += ct.later is not slot
        slot = ct.later
    assert table.find(ct.orig, now_ms) is ct
    assert moves == 2


def test_gc_ends_at_once_what_its_state_has_shortened(table: Table) -> None:
    ct = inserted(table, 1, timeout_ms=432_000_000)
    refresh(ct, 10_000, NOW)
    table.settle(ct, NOW)
    sweep(table, NOW + 10_000 + 2 * GC_PAUSE_MS)
    assert table.count == 0


@pytest.mark.parametrize("jump_s", [5, 100, 319, 320, 321, 1000, 1_000_000])
def test_gc_after_a_long_pause_ends_what_has_expired_and_nothing_else(table: Table, jump_s: int) -> None:
    """And looks at nothing for ever, wherever the wheel stood."""
    connections = [inserted(table, number, timeout_ms=number * 7_000 + 1) for number in range(200)]
    now_ms = NOW + jump_s * 1000
    turns = sweep(table, now_ms)
    assert turns <= 3
    alive = [ct for ct in connections if ct.expires_ms > now_ms]
    assert {ct.orig for ct in table.connections()} == {ct.orig for ct in alive}
    assert len(on_wheel(table)) == len(alive)
    late = inserted(table, 999, timeout_ms=20_000, now_ms=now_ms)
    sweep(table, now_ms + 22_000)
    assert late.status & IPS_DYING


def test_gc_of_an_empty_table_asks_to_come_again_later(table: Table) -> None:
    assert table.gc(NOW) == NOW + GC_PAUSE_MS


def test_the_wheel_keeps_nothing_dead(table: Table) -> None:
    for number in range(50):
        ct = inserted(table, number, timeout_ms=number * 100 + 1)
        if number % 2:
            table.kill(ct, NOW)
    assert len(on_wheel(table)) == 25
    sweep(table, NOW + 60_000)
    assert not on_wheel(table)
