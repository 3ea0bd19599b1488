"""The compiled ruleset decides as a naive reading of the file does: from top to bottom, the first that matches."""

import json
import os
import random
from collections.abc import Callable
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from conntrackd import config
from conntrackd.core.tuples import PROTOCOL_NAMES
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.match import decide, judge
from conntrackd.policy.ruleset import STATE_NAMES

# 100,000 pairs of ruleset and packet. Few packets of each ruleset can be shrunk; chance makes the rest, faster.
RULESETS = int(os.environ.get("RULESETS", "300"))
PACKETS = 10
MORE_PACKETS = 330

ZONES: dict[str, dict[str, list[str]]] = {
    "lan": {"interfaces": ["eth1", "veth*"]},
    "wan": {"interfaces": ["eth0"]},
    "dmz": {"interfaces": ["veth-dmz*"]},
    "guests": {"interfaces": ["veth*"], "sources": ["10.1.0.0/16", "2001:db8::/64"]},
    "vpn": {"sources": ["10.1.2.0/24", "fe80::/10"]},
}
LINKS = {1: "lo", 2: "eth0", 3: "eth1", 4: "veth7", 5: "veth-dmz1", 6: "wg0"}

SETS: dict[str, list[str]] = {
    "few": ["10.1.2.3", "192.0.2.0/31", "2001:db8::1"],
    "wide": ["10.0.0.0/9", "10.1.0.0/16", "fe80::/10"],
    "none": [],
}
SERVICES: dict[str, list[str]] = {"web": ["tcp/80", "tcp/8000-8080"], "tunnel": ["gre", "udp/1024-65535"]}
SERVICES["ping"] = ["icmp/echo-request", "icmpv6/echo-request"]

# Few enough values that rules and packets meet.
NETWORKS = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "192.0.2.0/31", "0.0.0.0/0", "10.1.2.0/27"]
NETWORKS += ["2001:db8::/32", "2001:db8::1", "fe80::/10", "::/0", "2001:db8::/126"]
SOURCES = NETWORKS + ["!" + network for network in NETWORKS] + [f"{no}@{name}" for no in ("", "!") for name in SETS]
ADDRESSES4 = ["10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.1", "192.0.2.2", "255.255.255.255", "10.1.2.40"]
ADDRESSES6 = ["2001:db8::1", "2001:db8::2", "fe80::1", "ff02::1", "2001:db8:0:1::1"]
PORTS: list[int | str] = [0, 22, 80, "80", "20-25", "8000-8080", "1024-65535", "0-65535"]
PROTOCOLS: list[int | str] = ["tcp", "udp", "icmp", "icmpv6", "sctp", "gre", "udplite", 89]
ECHO_REQUEST = {1: 8, 58: 128}
NUMBERS = {name: number for number, name in PROTOCOL_NAMES.items()}


def some(values: list[Any]) -> st.SearchStrategy[Any]:
    """One of the values, or a list of some."""
    return st.sampled_from(values) | st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True)


@st.composite
def rules(draw: st.DrawFn) -> dict[str, Any]:
    rule: dict[str, Any] = {"action": draw(st.sampled_from(["accept", "drop", "reject"]))}
    state = draw(st.sampled_from([None, None, None, "new", "related", "invalid", ["new", "related"]]))
    if state is not None:
        rule["state"] = state
    for key, values in (("from", [*ZONES, "self", "any"]), ("to", [*ZONES, "self", "any"])):
        if draw(st.booleans()) and not (key == "to" and state == "invalid"):
            rule[key] = draw(some(values))
    for key in ("source", "destination"):
        if draw(st.integers(0, 2)) == 0:
            rule[key] = draw(some(SOURCES))
    kind = draw(st.sampled_from(["none", "protocol", "ports", "types", "service"]))
    if kind == "protocol":
        rule["protocol"] = draw(some(PROTOCOLS))
    elif kind == "ports":
        rule["protocol"] = draw(some(["tcp", "udp", "sctp", "udplite"]))
        rule["port"] = draw(some(PORTS))
    elif kind == "types":
        rule["protocol"] = draw(some(["icmp", "icmpv6"]))
        rule["icmp_type"] = draw(some(["echo-request", 8, 13, 139]))
    elif kind == "service":
        rule["service"] = draw(some(list(SERVICES)))
    return rule


@st.composite
def packets(draw: st.DrawFn) -> dict[str, Any]:
    return make_packet(lambda values: draw(st.sampled_from(values)))


def make_packet(choose: Callable[[list[Any]], Any]) -> dict[str, Any]:
    addresses = choose([ADDRESSES4, ADDRESSES6])
    protonum = choose([*PROTOCOL_NAMES, 89, 50])
    packet: dict[str, Any] = {
        "state": choose(["new", "new", "new", "related", "invalid"]),
        "protonum": protonum,
        "source": choose(addresses),
        "destination": choose(addresses),
        "iif": choose([0, *LINKS, 99]),
        "oif": choose([0, *LINKS, 99]),
    }
    if protonum in ECHO_REQUEST:
        packet["type"] = choose([8, 13, 128, 139])
        packet["tail"] = [0, 7, packet["type"], choose([0, 1])]
    elif protonum in (6, 17, 132, 136):
        packet["port"] = choose([0, 21, 22, 80, 1023, 1024, 8050, 8081, 65535])
        packet["tail"] = [0x9C, 0x40, *packet["port"].to_bytes(2, "big")]
    else:
        packet["tail"] = [0, 0, 0, 0]
    return packet


# --- The naive reading ------------------------------------------------------------------------------------------


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@cache
def inside(address: str, network: str) -> bool:
    return ip_address(address) in ip_network(network)


def pattern_fits(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def naive_zone(ifindex: int, address: str) -> str | None:
    """The zone of the smallest network here, else that of the interface: its name, else its longest beginning."""
    if ifindex == 0:
        return "self"
    name = LINKS.get(ifindex, "")
    here = []
    for zone, section in ZONES.items():
        patterns = section.get("interfaces")
        if patterns is not None and not any(pattern_fits(pattern, name) for pattern in patterns):
            continue
        for network in section.get("sources", []):
            if inside(address, network):
                here.append((ip_network(network).prefixlen, zone))
    if here:
        return max(here)[1]
    plain = [
        (pattern == name, len(pattern), zone)
        for zone, section in ZONES.items()
        if "sources" not in section
        for pattern in section["interfaces"]
        if pattern_fits(pattern, name)
    ]
    return max(plain)[2] if name and plain else None


def naive(policy: dict[str, str], rule_list: list[dict[str, Any]], packet: dict[str, Any]) -> tuple[str, str]:
    """The name of the rule that decides, and what it does."""
    for index, rule in enumerate(rule_list):
        if naive_match(rule, packet):
            return f"rule-{index}", rule["action"]
    if packet["state"] != "new":
        return f"default-{packet['state']}", policy[packet["state"]]
    if packet["iif"] == 0:
        return "default-output", policy["output"]
    if packet["oif"] == 0:
        return "default-input", policy["input"]
    return "default-forward", policy["default"]


def naive_match(rule: dict[str, Any], packet: dict[str, Any]) -> bool:
    if packet["state"] not in listed(rule.get("state", "new")):
        return False
    for key, ifindex, address in (("from", "iif", "source"), ("to", "oif", "destination")):
        zones = listed(rule.get(key, "any"))
        if "any" not in zones and naive_zone(packet[ifindex], packet[address]) not in zones:
            return False
    for key in ("source", "destination"):
        entries = listed(rule.get(key, []))
        wanted = [entry for entry in entries if not entry.startswith("!")]
        if wanted and not any(naive_source(entry, packet[key]) for entry in wanted):
            return False
        if any(naive_source(entry[1:], packet[key]) for entry in entries if entry.startswith("!")):
            return False
    if "service" in rule:
        parts = [part for name in listed(rule["service"]) for part in SERVICES[name]]
        return any(naive_service(part, packet) for part in parts)
    if "protocol" in rule and packet["protonum"] not in [NUMBERS.get(p, p) for p in listed(rule["protocol"])]:
        return False
    if "port" in rule and not any(naive_port(entry, packet["port"]) for entry in listed(rule["port"])):
        return False
    if "icmp_type" in rule:
        echo = ECHO_REQUEST[packet["protonum"]]
        return packet["type"] in [echo if kind == "echo-request" else kind for kind in listed(rule["icmp_type"])]
    return True


def naive_source(entry: str, address: str) -> bool:
    networks = SETS[entry[1:]] if entry.startswith("@") else [entry]
    return any(inside(address, network) for network in networks)


def naive_port(entry: int | str, port: int) -> bool:
    ends = [int(end) for end in str(entry).split("-")]
    return ends[0] <= port <= ends[-1]


def naive_service(part: str, packet: dict[str, Any]) -> bool:
    protocol, _, rest = part.partition("/")
    if NUMBERS[protocol] != packet["protonum"]:
        return False
    if rest == "echo-request":
        return bool(packet["type"] == ECHO_REQUEST[packet["protonum"]])
    return not rest or naive_port(rest, packet["port"])


# --- Both, side by side -----------------------------------------------------------------------------------------


def to_toml(policy: dict[str, str], rule_list: list[dict[str, Any]]) -> str:
    lines = ["version = 1", "[policy]", *(f"{key} = {json.dumps(value)}" for key, value in policy.items())]
    for zone, section in ZONES.items():
        lines += [f"[zones.{zone}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    lines += ["[services]", *(f"{name} = {json.dumps(parts)}" for name, parts in SERVICES.items())]
    for name, addresses in SETS.items():
        lines += [f"[sets.{name}]", f"addresses = {json.dumps(addresses)}"]
    for index, rule in enumerate(rule_list):
        lines += ["[[rule]]", f'name = "rule-{index}"']
        lines += [f"{key} = {json.dumps(value)}" for key, value in rule.items()]
    return "\n".join(lines)


def to_tuple(packet: dict[str, Any]) -> bytes:
    addresses = ip_address(packet["source"]).packed + ip_address(packet["destination"]).packed
    return bytes((packet["protonum"],)) + addresses + bytes(packet["tail"])


answers = st.sampled_from(["accept", "drop", "reject"])
verdicts = st.sampled_from(["accept", "drop"])
policies = st.fixed_dictionaries(
    {"default": answers, "input": answers, "output": answers, "related": verdicts, "invalid": verdicts}
)


@settings(max_examples=RULESETS, deadline=None)
@given(
    policies,
    st.lists(rules(), max_size=12),
    st.lists(packets(), min_size=PACKETS, max_size=PACKETS),
    st.integers(0, 1 << 32),
)
def test_compiled_is_naive(
    policy: dict[str, str], rule_list: list[dict[str, Any]], packet_list: list[dict[str, Any]], seed: int
) -> None:
    chance = random.Random(seed)
    packet_list = packet_list + [make_packet(chance.choice) for _ in range(MORE_PACKETS)]
    compiled = compile_ruleset(config.parse(to_toml(policy, rule_list).encode(), "test.toml"), 1)
    compiled.set_links(LINKS)
    for packet in packet_list:
        state = STATE_NAMES.index(packet["state"])
        args = (compiled, state, to_tuple(packet), packet["iif"], packet["oif"] if packet["state"] != "invalid" else 0)
        rule = judge(*args, 0)
        name, action = naive(policy, rule_list, packet)
        assert rule.name == name
        assert rule.accept == (action == "accept")
        assert decide(*args, 0) is rule
        event("by a rule" if rule.name.startswith("rule") else "by a default")
    assert sum(rule.hits for rule in compiled.rules) == len(packet_list)
