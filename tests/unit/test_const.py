from conntrackd import const


def constants(prefix: str) -> dict[str, int]:
    return {name: value for name, value in vars(const).items() if name.startswith(prefix)}


def test_every_ctinfo_has_one_name_of_its_own() -> None:
    values = {value for prefix in ("IP_CT_", "INVALID_", "STRESSED_") for value in constants(prefix).values()}
    values -= set(constants("IP_CT_DIR_").values()) - {const.IP_CT_ESTABLISHED, const.IP_CT_RELATED}
    assert values == set(const.CTINFO_NAMES)
    assert len(set(const.CTINFO_NAMES.values())) == len(const.CTINFO_NAMES)


def test_reasons_have_different_values_in_their_ranges() -> None:
    reasons = constants("INVALID_")
    assert len(set(reasons.values())) == len(reasons)
    assert all(const.INVALID <= value < const.STRESSED for value in reasons.values())
    assert all(value >= const.STRESSED for value in constants("STRESSED_").values())


def test_ctinfo_and_status_are_the_kernels_numbers() -> None:
    """include/uapi/linux/netfilter/nf_conntrack_common.h"""
    ctinfo = ("ESTABLISHED", "RELATED", "NEW", "ESTABLISHED_REPLY", "RELATED_REPLY", "UNTRACKED")
    assert [constants("IP_CT_")["IP_CT_" + name] for name in ctinfo] == [0, 1, 2, 3, 4, 7]
    status = ("EXPECTED", "SEEN_REPLY", "ASSURED", "CONFIRMED", "DYING", "FIXED_TIMEOUT")
    assert [constants("IPS_")["IPS_" + name] for name in status] == [1, 2, 4, 8, 512, 1024]


def test_mark_bits_fit_into_six_and_do_not_overlap() -> None:
    classes = [const.MARK_UNSEEN, const.MARK_NEW, const.MARK_ESTABLISHED, const.MARK_RELATED]
    classes += [const.MARK_INVALID, const.MARK_UNTRACKED]
    assert [bits >> const.MARK_CLASS_SHIFT for bits in classes] == [0, 1, 2, 3, 4, 5]
    parts = [const.MARK_CLASS, const.MARK_REPLY, const.MARK_UNCONFIRMED, const.MARK_OFFLOADED]
    assert sum(parts) == 63
    assert const.MARK_CLASS | const.MARK_REPLY | const.MARK_UNCONFIRMED | const.MARK_OFFLOADED == 63
    assert const.DROP < 0
