"""Limits of rules: how often (token buckets), and how many connections at a time.

A bucket is one number, the time at which it is full again [GCRA, ITU-T I.371 A.2]: nothing is refilled, and a bucket
that is full is the same as one that was never there.
"""

from typing import Final

NANOSECONDS: Final = 1_000_000
KEYS_MAX: Final = 65536  # sources of one rule that are remembered

PER_RULE: Final = 0
PER_SRC: Final = 1
PER_DST: Final = 2


class Bucket:
    """A token bucket: `burst` tokens, and `count` new ones in `period_ms`."""

    def __init__(self, count: int, period_ms: int, burst: int) -> None:
        self.interval_ns = max(1, period_ms * NANOSECONDS // count)
        self.tolerance_ns = (burst - 1) * self.interval_ns
        self.full_ns = 0

    def take(self, now_ms: int) -> bool:
        """Take a token; False if there is none."""
        now_ns = now_ms * NANOSECONDS
        if self.full_ns < now_ns:
            self.full_ns = now_ns
        if self.full_ns - now_ns > self.tolerance_ns:
            return False
        self.full_ns += self.interval_ns
        return True


class RateLimit:
    """`limit` of a rule: a token bucket for the rule, or one for each source or destination."""

    def __init__(self, count: int, period_ms: int, burst: int, per: int) -> None:
        self.interval_ns = max(1, period_ms * NANOSECONDS // count)
        self.tolerance_ns = (burst - 1) * self.interval_ns
        self.per = per
        # Address -> when its bucket is full again, in two generations: at the limit the older one is forgotten whole.
        self.full_ns: dict[bytes, int] = {}
        self.full_old_ns: dict[bytes, int] = {}
        self.exceeded = 0

    def take(self, tuple_: bytes, now_ms: int) -> bool:
        """Take a token for a new connection; False if there is none."""
        key = b""
        size = (len(tuple_) - 5) >> 1
        if self.per == PER_SRC:
            key = tuple_[1 : 1 + size]
        elif self.per == PER_DST:
            key = tuple_[1 + size : 1 + 2 * size]
        now_ns = now_ms * NANOSECONDS
        full_ns = self.full_ns.get(key, -1)
        if full_ns < 0:
            full_ns = self.full_old_ns.get(key, 0)
            if len(self.full_ns) >= KEYS_MAX >> 1:
                self.full_old_ns = self.full_ns
                self.full_ns = {}
        if full_ns < now_ns:
            full_ns = now_ns
        if full_ns - now_ns > self.tolerance_ns:
            self.full_ns[key] = full_ns
            self.exceeded += 1
            return False
        self.full_ns[key] = full_ns + self.interval_ns
        return True
