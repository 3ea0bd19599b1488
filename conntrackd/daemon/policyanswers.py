"""What the daemon says about its policy, and the sets that it changes on request (api.py)."""

import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from socket import AF_INET, AF_INET6
from typing import Final

import msgspec
import structlog
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from conntrackd import api, values
from conntrackd.daemon.control import Asked, arguments
from conntrackd.daemon.links import Links
from conntrackd.hooks import Firewall
from conntrackd.mistakes import nearest, sentence
from conntrackd.policy.explain import ExplainError, explain, parse
from conntrackd.policy.ruleset import ACCEPT, ACTION_NAMES
from conntrackd.policy.sets import CONFIGURED, FOR_EVER, AddressSet

FLOWS_AT_ONCE: Final = 1000
RTN_LOCAL: Final = 2

log = structlog.get_logger()


class PolicyAnswers:
    """Everything that can be asked about the policy. `now_ms` is set by the loop whenever it wakes."""

    def __init__(self, fw: Firewall, links: Links) -> None:
        self.now_ms = 0
        self._fw = fw
        self._links = links

    def rows(self, asked: Asked) -> Iterator[msgspec.Struct | None] | None:
        """Begin to answer a command; None if it is none of these."""
        if asked.command == "rules":
            return self._rules()
        if asked.command == "explain":
            return iter(self._explain(arguments(asked, api.ExplainArgs).packet))
        if asked.command == "set":
            return self._set(asked)
        return None

    # --- Rules ----------------------------------------------------------------------------------------------------

    def _rules(self) -> Iterator[api.RuleRow | None]:
        """List the rules. Connections that are there count for themselves, so all are looked at, a few at a time."""
        packets: dict[str, int] = {}
        octets: dict[str, int] = {}
        for number, ct in enumerate(self._fw.net.table.connections()):
            if ct.account is not None:
                packets[ct.rule] = packets.get(ct.rule, 0) + ct.packets_orig + ct.packets_reply
                octets[ct.rule] = octets.get(ct.rule, 0) + ct.bytes_orig + ct.bytes_reply
            if number % FLOWS_AT_ONCE == FLOWS_AT_ONCE - 1:
                yield None
        wall_s = time.time()
        for rule in self._fw.ruleset.rules:
            admits = rule.action == ACCEPT and (rule.flows > 0 or rule.account.live > 0)
            last_s = wall_s - (self.now_ms - rule.last_hit_ms) / 1000
            yield api.RuleRow(
                name=rule.name,
                action=ACTION_NAMES[rule.action],
                hits=rule.hits,
                flows=rule.flows,
                live=rule.account.live,
                packets=rule.account.packets + packets.get(rule.name, 0) if admits else rule.hits,
                bytes=rule.account.bytes + octets.get(rule.name, 0) if admits else rule.hit_bytes,
                last_hit=api.timestamp(last_s) if rule.hits else None,
            )

    # --- Explain --------------------------------------------------------------------------------------------------

    def _explain(self, text: str) -> list[api.ExplainStep]:
        try:
            packet = parse(text)
        except ExplainError as error:
            raise api.RequestError(str(error)) from None
        size = (len(packet.tuple_) - 5) >> 1
        source, target = packet.tuple_[1 : 1 + size], packet.tuple_[1 + size : 1 + 2 * size]
        from_zone, came = self._zone(packet.way_in, source, "in")
        to_zone, goes = self._zone(packet.way_out, target, "out")
        asked = explain(self._fw.ruleset, packet, from_zone, to_zone, self.now_ms, (came, goes))
        steps = [api.ExplainStep(*step) for step in asked]
        ct = self._fw.net.table.get(packet.tuple_)
        if ct is not None:
            why = f"the packet belongs to connection {ct.id}, which this rule has admitted: no rule is asked"
            steps.append(api.ExplainStep(ct.rule, "accept", True, why))
        return steps

    def _zone(self, where: str, address: bytes, way: str) -> tuple[int, str]:
        """Find the zone that is meant: by name, by an interface, or by where the router would send to the address.

        And the name of the interface; "" if there is none.
        """
        ruleset = self._fw.ruleset
        number = int.from_bytes(address, "big")
        if not where:
            index = _route(address, way)
            return ruleset.zone(index, number, len(address) == 16), self._links.names.get(index, "")
        if where in ruleset.zones:
            return ruleset.zones[where], ""
        for index, name in self._links.names.items():
            if name == where:
                return ruleset.zone(index, number, len(address) == 16), name
        options = [*ruleset.zones, *self._links.names.values()]
        raise api.RequestError(sentence(f"There is no zone and no interface {where!r}", nearest(where, options)))

    # --- Sets -----------------------------------------------------------------------------------------------------

    def _set(self, asked: Asked) -> Iterator[msgspec.Struct]:
        args = arguments(asked, api.SetArgs)
        action, name = args.action, args.name
        sets = self._fw.ruleset.sets
        if action == "list" and not name:
            return iter([self._set_row(entry) for entry in sets.values()])
        if name not in sets:
            raise api.RequestError(sentence(f"There is no set {name!r}", nearest(name, list(sets))))
        if action == "list":
            return self._entries(sets[name])
        if not asked.may_change():
            raise api.RequestError(f"Changing a set needs root, and you are {asked.who()}.")
        try:
            network = values.network(args.address)
        except ValueError as wrong:
            context: dict[str, str] = getattr(wrong, "context", {})
            raise api.RequestError(sentence(context["message"], context["hint"])) from None
        entry, ipv6 = sets[name], network.version == 6
        address, length = int(network.network_address), network.prefixlen
        if action == "add":
            message = self._add(entry, ipv6, address, length, args.timeout_ms, str(network))
        elif action == "del":
            message = self._delete(entry, ipv6, address, length, str(network))
        else:
            raise api.RequestError(f"There is no action {action!r} of sets.")
        log.info("set_changed", action=action, set=name, address=str(network), who=asked.who(), pid=asked.pid)
        return iter([api.Done(message)])

    def _add(self, entry: AddressSet, ipv6: bool, address: int, length: int, timeout: int | None, text: str) -> str:
        if entry.configured(ipv6, address, length):
            return f"{text} stands in the configuration of {entry.name} already."
        timeout_ms = entry.timeout_ms if timeout is None else timeout
        ends_ms = self.now_ms + timeout_ms if timeout_ms > 0 else FOR_EVER
        if not entry.add(ipv6, address, length, ends_ms, self.now_ms):
            raise api.RequestError(f"Set {entry.name} is full ({entry.size} added): raise sets.{entry.name}.size.")
        return f"{text} is in {entry.name}" + (f" for {timeout_ms // 1000} s." if timeout_ms > 0 else ".")

    def _delete(self, entry: AddressSet, ipv6: bool, address: int, length: int, text: str) -> str:
        if entry.configured(ipv6, address, length):
            raise api.RequestError(
                f"{text} stands in the configuration of {entry.name}: take it out there, and reload."
            )
        if not entry.remove(ipv6, address, length):
            raise api.RequestError(f"{text} is not in {entry.name}.")
        return f"{text} is no longer in {entry.name}."

    def _set_row(self, entry: AddressSet) -> api.SetRow:
        entry.sweep(self.now_ms)
        total = entry.ipv4.count() + entry.ipv6.count()
        return api.SetRow(entry.name, total - len(entry.added), len(entry.added), entry.size, entry.refused)

    def _entries(self, entry: AddressSet) -> Iterator[api.SetEntry]:
        for prefixes, make in ((entry.ipv4, IPv4Address), (entry.ipv6, IPv6Address)):
            for shift, table in zip(list(prefixes.shifts), list(prefixes.tables), strict=True):
                for prefix, ends_ms in list(table.items()):
                    address = str(make(prefix << shift))
                    left_s = None if ends_ms in (CONFIGURED, FOR_EVER) else (ends_ms - self.now_ms) // 1000
                    if left_s is None or left_s >= 0:
                        text = f"{address}/{prefixes.bits - shift}" if shift else address
                        yield api.SetEntry(text, ends_ms == CONFIGURED, left_s)


def _route(address: bytes, way: str) -> int:
    """Ask the kernel where it would send to an address: the interface's index, 0 for the router itself."""
    text = str(ip_address(address))
    try:
        with IPRoute() as ipr:
            (route,) = ipr.route("get", dst=text, family=AF_INET6 if len(address) == 16 else AF_INET)
    except (NetlinkError, ValueError):
        raise api.RequestError(f"The router has no route to {text}: add `{way} ZONE` or `{way} INTERFACE`.") from None
    if route["type"] == RTN_LOCAL:
        return 0
    return int(route.get("oif") or 0)
