"""Many messages from a socket in one system call: recvmmsg(2), which the standard library does not have."""

import ctypes
import os
from ctypes import POINTER, Structure, byref, c_int, c_size_t, c_uint, c_ushort, c_void_p
from typing import ClassVar, Final

MSG_DONTWAIT: Final = 0x40

libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(Structure):
    _fields_: ClassVar = [("base", c_void_p), ("length", c_size_t)]


class _Msghdr(Structure):
    _fields_: ClassVar = [
        ("name", c_void_p),
        ("name_length", c_uint),
        ("iov", POINTER(_Iovec)),
        ("iov_length", c_size_t),
        ("control", c_void_p),
        ("control_length", c_size_t),
        ("flags", c_int),
    ]


class _Mmsghdr(Structure):
    _fields_: ClassVar = [("header", _Msghdr), ("length", c_uint), ("padding", c_ushort * 2)]


class Inbox:
    """Room for `slots` messages of up to `size` bytes each."""

    def __init__(self, slots: int, size: int) -> None:
        self.slots = slots
        self.size = size
        room = (ctypes.c_char * (slots * size))()
        self._iovecs = (_Iovec * slots)()
        self._headers = (_Mmsghdr * slots)()
        for slot in range(slots):
            self._iovecs[slot] = _Iovec(ctypes.addressof(room) + slot * size, size)
            self._headers[slot].header.iov = ctypes.pointer(self._iovecs[slot])
            self._headers[slot].header.iov_length = 1
        self.room = memoryview(room).cast("B")
        # The length of message N, as the kernel writes it behind each header.
        words = ctypes.sizeof(_Mmsghdr) // 4
        self.lengths = memoryview(self._headers).cast("B").cast("I")[_Mmsghdr.length.offset // 4 :: words]

    def receive(self, fd: int, count: int) -> int:
        """Take up to `count` messages that are there; returns how many. Raises OSError, also when there are none."""
        received: int = libc.recvmmsg(fd, byref(self._headers), min(count, self.slots), MSG_DONTWAIT, None)
        if received < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return received

    def message(self, slot: int) -> bytes:
        """Copy message `slot` of the last `receive` out; one that was too long is cut."""
        start = slot * self.size
        return bytes(self.room[start : start + self.lengths[slot]])
