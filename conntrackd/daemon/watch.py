"""Tells the operator in time that the table fills up, and that it had to refuse connections."""

from typing import Final

import structlog

from conntrackd.core.net import Conntrack

WARN_PERCENT: Final = (80, 95)
QUIET_PERCENT: Final = 5  # the table must be emptier by this before the same is said again

log = structlog.get_logger()


class TableWatch:
    """Looks at the table about once a second: a line for each level it rises above, and for what was refused."""

    def __init__(self, net: Conntrack) -> None:
        self._net = net
        self._said_percent = 0
        self._refused = 0

    def tick(self) -> None:
        """Look, and say what there is to say."""
        limit, count = self._net.sysctl.max, self._net.table.count
        percent = count * 100 // limit if limit else 0
        reached = max((level for level in WARN_PERCENT if percent >= level), default=0)
        if reached > self._said_percent:
            log.warning("table_filling", flows=count, max=limit, percent=percent)
            self._said_percent = reached
        elif percent < self._said_percent - QUIET_PERCENT:
            self._said_percent = reached
        stats = self._net.stats
        refused = stats.table_full - self._refused
        if refused:
            log.warning(
                "table_full", dropped=refused, flows=count, max=limit, early_drop=stats.early_drop,
                emergency_drop=stats.emergency_drop,
            )  # fmt: skip
            self._refused = stats.table_full
