"""Token buckets: how many at once, how many after a while, and whose."""

import pytest

from conntrackd.policy.limits import KEYS_MAX, PER_DST, PER_RULE, PER_SRC, Bucket, RateLimit


def tuple_(source: int, destination: int = 1) -> bytes:
    return bytes((6, 10, *source.to_bytes(3, "big"), 10, 9, 9, destination, 0, 1, 0, 2))


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    bucket = Bucket(10, 1000, 5)
    assert [bucket.take(1000) for _ in range(7)] == [True] * 5 + [False] * 2
    assert not bucket.take(1099)
    assert bucket.take(1100)
    assert not bucket.take(1100)
    # It does not save up more than its burst.
    assert [bucket.take(90_000) for _ in range(7)] == [True] * 5 + [False] * 2


@pytest.mark.parametrize(("count", "period_ms"), [(1, 86_400_000), (100, 60_000), (3, 1000)])
def test_rates_of_all_sizes(count: int, period_ms: int) -> None:
    bucket = Bucket(count, period_ms, 1)
    passed = sum(bucket.take(now * period_ms // 3000) for now in range(3001))
    assert passed == pytest.approx(min(count, 3000), abs=2)


def test_a_rate_beyond_one_a_millisecond() -> None:
    bucket = Bucket(2_000_000, 1000, 2000)
    assert sum(bucket.take(now) for now in range(3) for _ in range(5000)) == 6000


@pytest.mark.parametrize(
    ("per", "second_source", "second_destination"),
    [(PER_RULE, False, False), (PER_SRC, True, False), (PER_DST, False, True)],
)
def test_whose_the_bucket_is(per: int, second_source: bool, second_destination: bool) -> None:
    limit = RateLimit(1, 3_600_000, 1, per)
    assert limit.take(tuple_(1), 0)
    assert not limit.take(tuple_(1), 0)
    assert limit.exceeded == 1
    assert limit.take(tuple_(2), 0) == second_source
    assert limit.take(tuple_(1, 2), 0) == second_destination


def test_sources_are_forgotten_when_there_are_too_many() -> None:
    limit = RateLimit(1, 3_600_000, 1, PER_SRC)
    for source in range(2 * KEYS_MAX):
        assert limit.take(tuple_(source), 0)
        # The most recent ones are remembered.
        assert not limit.take(tuple_(source), 0)
        assert not source or not limit.take(tuple_(source - 1), 0)
        assert len(limit.full_ns) + len(limit.full_old_ns) <= KEYS_MAX
    assert limit.take(tuple_(0), 0)
