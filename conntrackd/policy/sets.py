"""Sets of addresses: a dictionary of prefixes for each prefix length that is used.

A lookup costs one probe per length, whatever the number of addresses: a million of them take about 70 MB and load in
a second, half of the memory and a third of the time of a radix tree (pytricia 1.3; py-radix 1.1 takes seven times as
much). Entries can be taken out, and have a time at which they end.
"""

from typing import Final

FOR_EVER: Final = (1 << 61) - 1  # ends after every time there is: an address that was added without a timeout
CONFIGURED: Final = 0  # stands in the configuration


class Prefixes:
    """Networks of one family, of `bits` bits; the value of each is the time it ends, in ms, or a number of the user."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.shifts: list[int] = []  # bits behind the prefix, ascending: the longest prefix first
        self.tables: list[dict[int, int]] = []  # for each shift: prefix -> value

    def adopt(self, prefixes: dict[int, dict[int, int]]) -> None:
        """Take whole dictionaries, by prefix length."""
        for length in sorted(prefixes, reverse=True):
            self.shifts.append(self.bits - length)
            self.tables.append(prefixes[length])

    def put(self, address: int, length: int, value: int) -> None:
        """Add a network, or change its value."""
        shift = self.bits - length
        at = 0
        while at < len(self.shifts) and self.shifts[at] < shift:
            at += 1
        if at == len(self.shifts) or self.shifts[at] != shift:
            self.shifts.insert(at, shift)
            self.tables.insert(at, {})
        self.tables[at][address >> shift] = value

    def get(self, address: int, length: int) -> int:
        """Look up the value of exactly this network; -1 if it is not there."""
        shift = self.bits - length
        for at in range(len(self.shifts)):
            if self.shifts[at] == shift:
                return self.tables[at].get(address >> shift, -1)
        return -1

    def remove(self, address: int, length: int) -> None:
        """Take a network out that is there."""
        shift = self.bits - length
        del self.tables[self.shifts.index(shift)][address >> shift]

    def has(self, address: int, now_ms: int) -> bool:
        """Whether an address is in one of the networks that have not ended."""
        for at in range(len(self.shifts)):
            ends = self.tables[at].get(address >> self.shifts[at])
            if ends is not None and (ends == CONFIGURED or ends > now_ms):
                return True
        return False

    def nearest(self, address: int) -> int:
        """Look up the value of the smallest network with an address; -1 if there is none."""
        for at in range(len(self.shifts)):
            value = self.tables[at].get(address >> self.shifts[at])
            if value is not None:
                return value
        return -1

    def count(self) -> int:
        """Count the networks, also those that have ended and were not swept yet."""
        return sum([len(table) for table in self.tables])


class AddressSet:
    """Addresses of both families, by name or, in a rule, without one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ipv4 = Prefixes(32)
        self.ipv6 = Prefixes(128)
        self.timeout_ms = 0  # of what is added while the daemon runs; 0 = none
        self.size = 0  # how much may be added
        # What was added while the daemon runs: (ipv6, address, length) -> when it ends. They are in the prefixes too.
        self.added: dict[tuple[bool, int, int], int] = {}
        self.refused = 0  # additions for which there was no room

    def add(self, ipv6: bool, address: int, length: int, ends_ms: int, now_ms: int) -> bool:
        """Add a network until a point in time, or FOR_EVER; False if there is no room for it.

        One that stands in the configuration stays as it is.
        """
        prefixes = self.ipv6 if ipv6 else self.ipv4
        if prefixes.get(address, length) == CONFIGURED:
            return True
        key = (ipv6, address, length)
        if key not in self.added and len(self.added) >= self.size:
            self.sweep(now_ms)
            if len(self.added) >= self.size:
                self.refused += 1
                return False
        self.added[key] = ends_ms
        prefixes.put(address, length, ends_ms)
        return True

    def remove(self, ipv6: bool, address: int, length: int) -> bool:
        """Take a network out again that was added; False if it was not."""
        if self.added.pop((ipv6, address, length), -1) < 0:
            return False
        (self.ipv6 if ipv6 else self.ipv4).remove(address, length)
        return True

    def configured(self, ipv6: bool, address: int, length: int) -> bool:
        """Whether exactly this network stands in the configuration."""
        return (self.ipv6 if ipv6 else self.ipv4).get(address, length) == CONFIGURED

    def sweep(self, now_ms: int) -> None:
        """Take out what has ended."""
        for ipv6, address, length in [key for key, ends_ms in self.added.items() if ends_ms <= now_ms]:
            self.remove(ipv6, address, length)

    def inherit(self, before: "AddressSet", now_ms: int) -> None:
        """Take over what was added to the set of the generation before."""
        for (ipv6, address, length), ends_ms in before.added.items():
            if ends_ms > now_ms:
                self.add(ipv6, address, length, ends_ms, now_ms)


class Addresses:
    """What a rule says about an address: in one of these sets, or in any if there are none; and in none of those."""

    def __init__(self) -> None:
        self.included: list[AddressSet] = []
        self.excluded: list[AddressSet] = []

    def match(self, address: int, ipv6: bool, now_ms: int) -> bool:
        """Whether it is true of an address."""
        for excluded in self.excluded:
            if (excluded.ipv6 if ipv6 else excluded.ipv4).has(address, now_ms):
                return False
        if not self.included:
            return True
        for included in self.included:  # noqa: SIM110 - a generator costs
            if (included.ipv6 if ipv6 else included.ipv4).has(address, now_ms):
                return True
        return False
