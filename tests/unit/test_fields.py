from conntrackd.wire.fields import u16, u32


def test_numbers_are_read_in_network_order_at_an_offset() -> None:
    data = bytes((0xFF, 0x12, 0x34, 0x56, 0x78, 0xFF))
    assert u16(data, 1) == 0x1234
    assert u32(data, 1) == 0x12345678


def test_largest_numbers_are_unsigned() -> None:
    assert u16(b"\xff" * 2, 0) == 0xFFFF
    assert u32(b"\xff" * 4, 0) == 0xFFFFFFFF
