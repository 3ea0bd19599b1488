"""All checks, in the order in which their findings are read."""

from collections.abc import Callable, Iterator
from typing import Final

from conntrackd.api import Diagnosis
from conntrackd.doctor import netfilter, system
from conntrackd.doctor.machine import OK, Machine

Check = Callable[[Machine], Iterator[Diagnosis]]

# What is said when nothing was found, and what looks.
CHECKS: Final[tuple[tuple[str, str, Check], ...]] = (
    ("configuration", "can be used", system.configuration),
    ("daemon", "runs, and says that all is well", system.daemon),
    ("capabilities", "are there", system.capabilities),
    ("kernel", "takes our rules", netfilter.kernel),
    ("rules", "are in place and in order", netfilter.in_place),
    ("queues", "are ours alone", netfilter.queues),
    ("marks", "are written by nobody else", netfilter.marks),
    ("firewalls", "there is no other", netfilter.others),
    ("kernel_conntrack", "is not at work", netfilter.kernel_conntrack),
    ("other_conntrackd", "netfilter.org's is not here", system.namesake),
    ("memory", "for the queues is granted", system.memory),
    ("zones", "have interfaces", system.zones),
    ("routing", "does not stand in the way", system.routing),
    ("clock", "can be right", system.clock),
)

# What is not looked at: by who may not see it, and where the daemon is in another network namespace.
FOR_ROOT: Final = ("kernel", "rules", "queues", "marks", "firewalls")
LOCAL: Final = (*FOR_ROOT, "kernel_conntrack", "other_conntrackd", "zones", "routing")


def examine(machine: Machine) -> Iterator[Diagnosis]:
    """Do all checks; one that finds nothing wrong says so."""
    for name, well, check in CHECKS:
        if (machine.blind and name in FOR_ROOT) or (machine.elsewhere and name in LOCAL):
            continue
        found = list(check(machine))
        yield from found or [Diagnosis(name, OK, well)]
