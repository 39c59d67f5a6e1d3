"""The frames that h2 is not asked about: messages of calls under way, and the room that is given back for them.

    bytes ──► FrameReader ──► (call, data)    a DATA frame, and nothing is special about it
                         └──► (None, bytes)   for h2: all else, whole frames, in the order in which they came

h2 takes such a frame through some forty functions, which was a quarter of what a leader did for a lone write. What it
keeps for a frame of data is how much may still be sent; for what is sent that stays with h2 (`Connection`), for what
arrives it is counted here. The last frame of a stream, a padded one, one of a stream that is unknown, over, or
announced its length: h2 decides what they are.    See: RFC 9113, 4.1, 6.1, 6.9; ADR 0023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from struct import Struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from raftkv.rpc.call import Call

PREFACE_BYTES: Final = 24  # with which a client begins; no frame

_DATA: Final = 0
_WINDOW_UPDATE: Final = 8
_HEADER: Final = Struct(">HBBBL")  # the length's 24 bits in two parts, kind, flags, stream
_HEADER_BYTES: Final = _HEADER.size
_UPDATE: Final = Struct(">HBBBLL")
_UPDATE_BYTES: Final = 4


def data_header(number: int, size: int) -> bytes:
    """What stands before `size` bytes of data of the stream `number`."""
    return _HEADER.pack(size >> 8, size & 0xFF, _DATA, 0, number)


class FrameReader:
    """Takes apart what arrives on one connection."""

    def __init__(self, calls: Mapping[int, Call], frame_bytes_max: int, before_frames: int) -> None:
        """
        Args:
            calls: those that are under way, by number; the connection's own.
            before_frames: how many bytes come before the first frame.
        """
        self._calls = calls
        self._frame_bytes_max = frame_bytes_max
        self._before_frames = before_frames
        self._rest = bytearray()  # of a frame that is not whole yet
        self._wanted = _HEADER_BYTES  # so long the rest must become before there is something to see

    def split(self, data: bytes) -> Iterator[tuple[Call | None, bytes]]:
        """What can be handed on now. Calls are looked up one by one: each part may begin or end one."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
            data = bytes(self._rest)
            self._rest.clear()
        begin = place = 0  # between these is what h2 gets next
        end = len(data)
        if self._before_frames:
            place = min(self._before_frames, end)
            self._before_frames -= place
        while True:
            if end - place < _HEADER_BYTES:
                self._wanted = _HEADER_BYTES
                break
            high, low, kind, flags, number = _HEADER.unpack_from(data, place)
            size = high << 8 | low
            stop = place + _HEADER_BYTES + size
            if size > self._frame_bytes_max:
                place = end  # h2 says so
                break
            if stop > end:
                self._wanted = _HEADER_BYTES + size
                break
            if kind == _DATA and not flags:
                if begin < place:
                    yield None, data[begin:place]
                    begin = place
                call = self._calls.get(number)
                if call is not None and call.is_plain and not call.is_complete:
                    yield call, data[place + _HEADER_BYTES : stop]
                    begin = stop
            place = stop
        if begin < place:
            yield None, data[begin:place]
        if place < end:
            self._rest += data[place:]


class Window:
    """Room for what the other side sends, in a call or in a connection (number 0), as far as it is counted here."""

    __slots__ = ("_number", "_owed", "_owed_max")

    def __init__(self, number: int, size: int) -> None:
        self._number = number
        self._owed = 0
        # h2 gives back by halves what it has counted: together that is less than all, so the room never stays at none.
        self._owed_max = size // 4

    def give_back(self, size: int) -> bytes:
        """So many bytes need no more room. Returns the frame that says so, where it is time to."""
        self._owed += size
        if self._owed < self._owed_max:
            return b""
        owed, self._owed = self._owed, 0
        return _UPDATE.pack(0, _UPDATE_BYTES, _WINDOW_UPDATE, 0, self._number, owed)
