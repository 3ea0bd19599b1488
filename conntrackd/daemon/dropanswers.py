"""The packets that were dropped most recently, as far as the ring in hooks.py remembers them."""

from collections.abc import Iterator

import msgspec

from conntrackd import api
from conntrackd.daemon import flowrows
from conntrackd.daemon.control import MORE, Asked, arguments
from conntrackd.daemon.flowanswers import Chosen
from conntrackd.daemon.links import Links
from conntrackd.daemon.standin import stand_in
from conntrackd.hooks import Firewall


class DropAnswers:
    """Answers `drops`. `now_ms` is set by the loop whenever it wakes."""

    def __init__(self, fw: Firewall, links: Links) -> None:
        self.now_ms = 0
        self._fw = fw
        self._links = links

    def rows(self, asked: Asked) -> Iterator[msgspec.Struct] | None:
        """Begin to answer; None if something else is asked."""
        if asked.command != "drops":
            return None
        args = arguments(asked, api.DropArgs)
        chosen = Chosen(args.filter, self._fw, self._links) if args.filter.strip() else None
        return self._drops(chosen, self.now_ms - args.last_ms if args.last_ms else None)

    def _drops(self, chosen: Chosen | None, since_ms: int | None) -> Iterator[msgspec.Struct]:
        """List them, the oldest first; one without a tuple only where no filter asks for it."""
        fw = self._fw
        newest = fw.drops_next % len(fw.drops) if fw.drops else 0
        for dropped_ms, reason, rule, key, iif, oif in fw.drops[newest:] + fw.drops[:newest]:
            if since_ms is not None and dropped_ms < since_ms:
                continue
            if chosen is not None:
                ct = stand_in(key, iif, oif, rule, dropped_ms) if key else None
                if ct is None or not chosen.matches(ct, ct, dropped_ms):
                    yield MORE
                    continue
            yield api.Drop(
                time=flowrows.moment(dropped_ms, self.now_ms),
                reason=reason,
                rule=rule or None,
                family=flowrows.family(key) if key else None,
                protocol=flowrows.protocol(key[0]) if key else None,
                protonum=key[0] if key else None,
                **(flowrows.ends(key) if key else {"src": None, "dst": None}),
                in_=self._links.interface(iif),
                out=self._links.interface(oif),
            )
