"""The two hooks: the only place where tracking meets policy.

`pre_routing` sees a packet first, `post_routing` sees it last and only if its connection is not confirmed yet (the
rules of the edge let the others pass by their mark). In strict order: track, then policy, then verdict.

Both return our six bits of the packet mark (const.MARK_*) for a packet that passes, or DROP. The mark stands in for
the kernel's `skb->nfct`: it tells the second hook what the first one found.
"""

from typing import Final

from conntrackd.const import (
    CLOSED_POLICY,
    CTINFO_NAMES,
    DROP,
    INVALID,
    INVALID_FRAGMENT,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IP_CT_RELATED,
    IP_CT_RELATED_REPLY,
    IP_CT_UNTRACKED,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_TCP,
    IPS_CONFIRMED,
    IPS_DYING,
    IPS_EXPECTED,
    IPS_SEEN_REPLY,
    MARK_CLASS,
    MARK_ESTABLISHED,
    MARK_INVALID,
    MARK_NEW,
    MARK_RELATED,
    MARK_REPLY,
    MARK_UNCONFIRMED,
    MARK_UNTRACKED,
    NF_ACCEPT,
    NF_DROP,
    NF_INET_LOCAL_OUT,
    NF_INET_PRE_ROUTING,
    STRESSED,
    STRESSED_HELPER,
    STRESSED_TABLE_FULL,
)
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import attach, confirm, conntrack_in, use_timeouts
from conntrackd.core.helper import assign_helper, help_new_packet
from conntrackd.core.helpers import HELPERS
from conntrackd.core.net import Conntrack
from conntrackd.core.proto.tcp_states import SYN_SENT as TCP_SYN_SENT
from conntrackd.core.table import zone_key
from conntrackd.core.tuples import destination, packet_tuple
from conntrackd.core.tuples import source as source_of
from conntrackd.policy.match import decide, judge, log_matches, untracked
from conntrackd.policy.reject import Answer, answer
from conntrackd.policy.ruleset import INVALID as ABOUT_INVALID
from conntrackd.policy.ruleset import NEW, REJECT, RELATED, Rule, Ruleset
from conntrackd.wire.ip import packet_length, transport

DROPS_MAX: Final = 1024  # recent drops that are remembered
# Of one turn of the loop; what comes on top is counted.
LOGS_MAX: Final = 256
ANSWERS_MAX: Final = 256
# Connections ended by a new policy whose stray packets begin no new one, and how long after the last such packet.
REVOKED_MAX: Final = 65536
REVOKED_MS: Final = 300_000

# Why a packet was dropped, besides the names of INVALID and STRESSED in const.CTINFO_NAMES.
DROPPED_BY_RULE: Final = "policy"
DROPPED_RELATED: Final = "related"
DROPPED_BY_RATE: Final = "rate_limit"
DROPPED_BY_FLOWS: Final = "connection_limit"
DROPPED_REVOKED: Final = "revoked"
DROPPED_CLASH: Final = "insert_failed"
DROPPED_BY_HELPER: Final = CTINFO_NAMES[STRESSED_HELPER]
# All that there are.
DROP_REASONS: Final = (
    DROPPED_BY_RULE,
    DROPPED_RELATED,
    DROPPED_BY_RATE,
    DROPPED_BY_FLOWS,
    DROPPED_REVOKED,
    DROPPED_CLASH,
    *[name for reason, name in CTINFO_NAMES.items() if reason >= INVALID],
)


class Firewall:
    """A tracker, a policy, and what came of the packets."""

    def __init__(self, net: Conntrack, ruleset: Ruleset) -> None:
        self.net = net
        self.ruleset = ruleset
        self.checksum = True  # whether the packet in hand carries a checksum that nobody has verified; set by the edge
        self.whole = 0  # its length, if it was cut on its way to us; set by the edge
        self.drop_counts: dict[str, int] = {}  # packets by reason
        self.unseen = 0  # packets that the second hook saw and the first had not
        # The most recent drops, newest at drops_next - 1: (now_ms, reason, rule, tuple, iif, oif).
        self.drops: list[tuple[int, str, str, bytes, int, int]] = []
        self.drops_next = 0
        # What the loop sends and writes when the packets of its turn are done.
        self.answers: list[Answer] = []  # of REJECT
        self.answers_suppressed = 0  # by the limit, or because there was nothing that could be sent
        # Packets that rules want logged: (now_ms, state, rule, action, tuple, iif, oif).
        self.logs: list[tuple[int, int, Rule, int, bytes, int, int]] = []
        # While connections are judged anew by a new policy: those of older generations are, at their next packet.
        self.rejudging = False
        # Tuples, with their zone, of connections that it ended -> until when they are remembered.
        self.revoked: dict[bytes, int] = {}


def pre_routing(fw: Firewall, data: bytes, hook: int, iif: int, now_ms: int, mark: int = 0) -> int:
    """Judge a packet at PREROUTING or OUTPUT: returns mark bits or DROP.

    A NEW packet passes here, marked unconfirmed: what it may do depends on where it is going. `mark` is the packet's
    whole mark, in which a conntrack zone may stand.
    """
    zone = fw.net.zone_of(iif, mark)
    if hook == NF_INET_LOCAL_OUT and attach(fw.net, data, zone):
        return MARK_RELATED | MARK_REPLY
    # The router's own packets carry checksums that it made itself; the kernel does not verify them either.
    checksum = fw.checksum and hook == NF_INET_PRE_ROUTING
    ctinfo, ct = conntrack_in(fw.net, data, checksum, now_ms, zone, fw.whole)
    if fw.rejudging and ct is not None and ct.status & IPS_CONFIRMED and not still_allowed(fw, ct, now_ms):
        return refuse(fw, fw.ruleset.by_name[ct.rule], DROPPED_REVOKED, data, packet_tuple(data), iif, 0, now_ms)
    if ctinfo == IP_CT_ESTABLISHED:
        return MARK_ESTABLISHED
    if ctinfo == IP_CT_ESTABLISHED_REPLY:
        return MARK_ESTABLISHED | MARK_REPLY
    if ctinfo >= INVALID:
        return judge_invalid(fw, ctinfo, data, iif, now_ms)
    if ctinfo == IP_CT_UNTRACKED:
        return MARK_UNTRACKED  # neighbour discovery and multicast listeners: a link can't do without
    assert ct is not None
    if ctinfo == IP_CT_NEW:
        if ct.status & IPS_CONFIRMED:
            return MARK_NEW
        if fw.ruleset.notrack_rules and untracked(fw.ruleset, ct.orig, iif, now_ms):
            fw.net.table.drop_unconfirmed(ct)
            return MARK_UNTRACKED
        return MARK_NEW | MARK_UNCONFIRMED
    assert ctinfo == IP_CT_RELATED or ctinfo == IP_CT_RELATED_REPLY
    if not ct.status & IPS_CONFIRMED:
        return MARK_RELATED | MARK_UNCONFIRMED
    if not judge_related(fw, ct, ctinfo, data, iif, now_ms):
        return DROP
    return MARK_RELATED | MARK_REPLY if ctinfo == IP_CT_RELATED_REPLY else MARK_RELATED


def post_routing(
    fw: Firewall, data: bytes, mark_bits: int, hook: int, iif: int, oif: int, now_ms: int, mark: int = 0
) -> int:
    """Judge a packet at POSTROUTING or INPUT: returns mark bits or DROP.

    Its connection is found by its tuple; `mark_bits` only say where to look first, for the mark may have been
    overwritten on the way. A packet that was not seen before is tracked here: nothing passes untracked. `mark` is the
    packet's whole mark.
    """
    table = fw.net.table
    zone = fw.net.zone_of(iif, mark)
    if not mark_bits & MARK_CLASS:
        fw.unseen += 1
    key = table.read_tuple(data[: packet_length(data)], 0, zone)
    if key:
        ct = table.find_unconfirmed(key, zone) if mark_bits & MARK_UNCONFIRMED else None
        if ct is None:
            ct = table.find(key, now_ms, zone)
            if ct is not None:
                if ct.help is not None and mark_bits & MARK_UNCONFIRMED:
                    # It was tracked as the second packet of a flow that has been confirmed meanwhile.
                    if help_new_packet(fw.net, ct, data, key == ct.reply, now_ms) == NF_DROP:
                        return drop(fw, DROPPED_BY_HELPER, ct.rule, key, iif, oif, now_ms)
                return confirmed_bits(ct, key)
            ct = table.find_unconfirmed(key, zone)
        if ct is not None:
            return judge_new(fw, ct, data, iif, oif, now_ms)
    bits = pre_routing(fw, data, hook, iif, now_ms, mark)
    if bits == DROP or not bits & MARK_UNCONFIRMED:
        return bits
    ct = table.find_unconfirmed(key, zone)
    assert ct is not None
    return judge_new(fw, ct, data, iif, oif, now_ms)


def judge_new(fw: Firewall, ct: Conn, data: bytes, iif: int, oif: int, now_ms: int) -> int:
    """Ask the policy about a new connection, and confirm it if it may be; interface 0 is the router itself."""
    state = RELATED if ct.status & IPS_EXPECTED else NEW
    rule = judge(fw.ruleset, state, ct.orig, iif, oif, now_ms)
    if rule.log or fw.ruleset.log_rules:
        log(fw, rule, state, ct.orig, iif, oif, now_ms)
    reason = "" if rule.accept else DROPPED_BY_RULE
    if not reason and rule.limited:
        reason = over_limit(rule, ct.orig, now_ms)
    if not reason and fw.revoked and is_revoked(fw, ct, now_ms):
        reason = DROPPED_REVOKED
    if reason:
        fw.net.table.kill(ct, now_ms)
        return refuse(fw, rule, reason, data, ct.orig, iif, oif, now_ms)
    ct.iif = iif
    ct.oif = oif
    ct.rule = rule.name
    ct.generation = fw.ruleset.generation
    if rule.mark >= 0:
        ct.mark = rule.mark
    if rule.timeouts_number:
        use_timeouts(fw.net, ct, rule.timeouts_number)
    if rule.helper:
        assign_helper(ct, HELPERS[rule.helper])
    if ct.help is not None and help_new_packet(fw.net, ct, data, False, now_ms) == NF_DROP:
        fw.net.table.kill(ct, now_ms)
        return drop(fw, DROPPED_BY_HELPER, rule.name, ct.orig, iif, oif, now_ms)
    verdict = confirm(fw.net, ct, now_ms, rule.labels)
    if verdict != NF_ACCEPT:
        if verdict == STRESSED_TABLE_FULL and fw.ruleset.table_full_accept:
            return MARK_UNTRACKED
        reason = DROPPED_CLASH if verdict == NF_DROP else CTINFO_NAMES[verdict]
        return drop(fw, reason, rule.name, ct.orig, iif, oif, now_ms)
    if ct.status & IPS_CONFIRMED:  # and not merged with another
        rule.flows += 1
        rule.account.enter(ct)
    return MARK_RELATED if ct.status & IPS_EXPECTED else MARK_NEW


def judge_invalid(fw: Firewall, ctinfo: int, data: bytes, iif: int, now_ms: int) -> int:
    """Decide on a packet that belongs to no connection: returns mark bits or DROP."""
    ruleset = fw.ruleset
    key = packet_tuple(data)
    if ctinfo >= STRESSED:
        if ctinfo == STRESSED_TABLE_FULL and ruleset.table_full_accept:
            return MARK_UNTRACKED
        return drop(fw, CTINFO_NAMES[ctinfo], "", key, iif, 0, now_ms)
    if ctinfo == INVALID_FRAGMENT:
        return MARK_INVALID if ruleset.fragment_accept else drop(fw, CTINFO_NAMES[ctinfo], "", key, iif, 0, now_ms)
    if key and ruleset.notrack_rules and untracked(ruleset, key, iif, now_ms):
        return MARK_UNTRACKED
    rule = judge(ruleset, ABOUT_INVALID, key, iif, 0, now_ms) if key else ruleset.default_invalid
    if rule.log or ruleset.log_rules:
        log(fw, rule, ABOUT_INVALID, key, iif, 0, now_ms)
    if rule.accept:
        return MARK_INVALID
    return refuse(fw, rule, CTINFO_NAMES[ctinfo], data, key, iif, 0, now_ms)


def judge_related(fw: Firewall, ct: Conn, ctinfo: int, data: bytes, iif: int, now_ms: int) -> bool:
    """Whether a RELATED packet of a confirmed connection passes: an ICMP error, or a connection that was expected."""
    protonum = transport(data, 0)[1]
    if protonum != IPPROTO_ICMP and protonum != IPPROTO_ICMPV6:
        return True  # a connection of its own, which was judged when it was new
    key = packet_tuple(data)
    # It goes where packets of the connection go in that direction.
    oif = ct.iif if ctinfo == IP_CT_RELATED_REPLY else ct.oif
    rule = judge(fw.ruleset, RELATED, key, iif, oif, now_ms)
    if rule.log or fw.ruleset.log_rules:
        log(fw, rule, RELATED, key, iif, oif, now_ms)
    if not rule.accept:
        refuse(fw, rule, DROPPED_RELATED, data, key, iif, oif, now_ms)
    return rule.accept


def over_limit(rule: Rule, key: bytes, now_ms: int) -> str:
    """Say which limit of a rule a new connection exceeds, and take its token if none; "" if none."""
    account = rule.account
    if rule.max_flows and account.live >= rule.max_flows:
        return DROPPED_BY_FLOWS
    if rule.max_flows_per_src and account.sources.get(source_of(key), 0) >= rule.max_flows_per_src:
        return DROPPED_BY_FLOWS
    if rule.rate is not None and not rule.rate.take(key, now_ms):
        return DROPPED_BY_RATE
    return ""


# --- A new policy -------------------------------------------------------------------------------------------------


def still_allowed(fw: Firewall, ct: Conn, now_ms: int) -> bool:
    """Judge a connection anew if it was admitted by an older policy; one that may not go on is ended."""
    ruleset = fw.ruleset
    if ct.generation == ruleset.generation:
        return True
    rule = decide(ruleset, RELATED if ct.status & IPS_EXPECTED else NEW, ct.orig, ct.iif, ct.oif, now_ms)
    master = ct.master
    if rule.accept and not (
        master is not None and master.status & IPS_DYING and zone_key(master.zone, master.orig) in fw.revoked
    ):
        ct.generation = ruleset.generation
        if ct.account is not None and ct.account is not rule.account:
            ct.account.move(ct, rule.account)
        ct.rule = rule.name
        return True
    ct.rule = rule.name
    for key in (ct.orig, ct.reply):
        if len(fw.revoked) >= REVOKED_MAX:
            del fw.revoked[next(iter(fw.revoked))]
        fw.revoked[zone_key(ct.zone, key)] = now_ms + REVOKED_MS
    fw.net.table.kill(ct, now_ms, CLOSED_POLICY)
    return False


def is_revoked(fw: Firewall, ct: Conn, now_ms: int) -> bool:
    """Whether a new connection is what is left of one that a new policy ended.

    Its other end may be allowed to open connections, but this is none. A SYN opens one, whatever was there before.
    """
    key = zone_key(ct.zone, ct.orig)
    until_ms = fw.revoked.get(key, 0)
    if until_ms <= now_ms or (ct.protonum == IPPROTO_TCP and ct.state == TCP_SYN_SENT):
        return False
    fw.revoked[key] = now_ms + REVOKED_MS
    return True


# --- What came of a packet ----------------------------------------------------------------------------------------


def confirmed_bits(ct: Conn, key: bytes) -> int:
    """Write anew the mark of a packet whose connection is confirmed."""
    if key == ct.reply:
        return MARK_ESTABLISHED | MARK_REPLY
    if ct.status & IPS_SEEN_REPLY:
        return MARK_ESTABLISHED
    return MARK_RELATED if ct.status & IPS_EXPECTED else MARK_NEW


def log(fw: Firewall, rule: Rule, state: int, key: bytes, iif: int, oif: int, now_ms: int) -> None:
    """Note a packet for the log: for the rules that only log, and for the one that decides."""
    if fw.ruleset.log_rules and key:
        for logger in log_matches(fw.ruleset, state, key, iif, oif, rule.order, now_ms):
            note(fw, logger, logger.action, state, key, iif, oif, now_ms)
    if rule.log:
        note(fw, rule, rule.action, state, key, iif, oif, now_ms)


def note(fw: Firewall, rule: Rule, action: int, state: int, key: bytes, iif: int, oif: int, now_ms: int) -> None:
    """Note one line for the log, as often as the limit allows."""
    assert rule.log_bucket is not None
    if len(fw.logs) < LOGS_MAX and rule.log_bucket.take(now_ms):
        fw.logs.append((now_ms, state, rule, action, key, iif, oif))
    else:
        rule.unlogged += 1


def refuse(fw: Firewall, rule: Rule, reason: str, data: bytes, key: bytes, iif: int, oif: int, now_ms: int) -> int:
    """Drop a packet as a rule says, with an answer if it says so; returns DROP."""
    rule.hit_bytes += packet_length(data)
    if rule.action == REJECT:
        reply = None
        if destination(key) not in fw.net.broadcasts and len(fw.answers) < ANSWERS_MAX:
            if fw.ruleset.reject_bucket.take(now_ms):
                reply = answer(data, rule.reject_with, iif)
        if reply is None:
            fw.answers_suppressed += 1
        else:
            fw.answers.append(reply)
    name = "" if rule is fw.ruleset.default_invalid or rule is fw.ruleset.default_related else rule.name
    return drop(fw, reason, name, key, iif, oif, now_ms)


def drop(fw: Firewall, reason: str, rule: str, key: bytes, iif: int, oif: int, now_ms: int) -> int:
    """Note a dropped packet, for the counters and for those who ask later; returns DROP."""
    fw.drop_counts[reason] = fw.drop_counts.get(reason, 0) + 1
    entry = (now_ms, reason, rule, key, iif, oif)
    if len(fw.drops) < DROPS_MAX:
        fw.drops.append(entry)
    else:
        fw.drops[fw.drops_next % DROPS_MAX] = entry
    fw.drops_next += 1
    return DROP
