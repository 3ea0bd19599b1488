"""The helpers, one file each. A new one is entered in HELPERS and needs no other change (docs/helpers.md)."""

from typing import Final

from conntrackd.core.helper import Helper
from conntrackd.core.helpers.amanda import Amanda
from conntrackd.core.helpers.broadcast import Broadcast
from conntrackd.core.helpers.ftp import Ftp
from conntrackd.core.helpers.irc import Irc
from conntrackd.core.helpers.pptp import Pptp
from conntrackd.core.helpers.sane import Sane
from conntrackd.core.helpers.sip import Sip
from conntrackd.core.helpers.tftp import Tftp

NETBIOS_NS_PORT: Final = 137
SNMP_PORT: Final = 161

# By the name that a rule gives them, the kernel's.
HELPERS: Final[dict[str, Helper]] = {
    helper.name: helper
    for helper in (
        Amanda(),
        Ftp(),
        Irc(),
        Broadcast("netbios-ns", NETBIOS_NS_PORT, 3_000),
        Pptp(),
        Sane(),
        Sip(),
        Broadcast("snmp", SNMP_PORT, 30_000),
        Tftp(),
    )
}
