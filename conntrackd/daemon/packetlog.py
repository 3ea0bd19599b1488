"""The log of packets that rules with `log` write: one line each, limited where they were noted."""

from collections.abc import Callable

import structlog

from conntrackd.core.tuples import format_tuple
from conntrackd.hooks import Firewall
from conntrackd.policy.ruleset import ACTION_NAMES, STATE_NAMES

log = structlog.get_logger()


def write(fw: Firewall, interface: Callable[[int], str | None]) -> None:
    """Write what was noted since the last time."""
    for _, state, rule, action, key, iif, oif in fw.logs:
        log.info(
            "packet",
            rule=rule.name,
            action=ACTION_NAMES[action],
            state=STATE_NAMES[state],
            packet=format_tuple(key) if key else None,
            interface_in=interface(iif),
            interface_out=interface(oif),
            suppressed=rule.unlogged,
        )
        rule.unlogged = 0
    fw.logs.clear()
