"""A change of a key on its way to everybody who watches it, encoded once for all of them."""

from __future__ import annotations

from raftkv._pb.common_pb2 import Event

_EVENTS_TAG = b"\x5a"  # field 11 of WatchResponse, length-delimited


class Change:
    """One event on its way to everybody who wants it; encoded once."""

    __slots__ = ("_full", "_plain", "event", "revision")

    def __init__(self, revision: int, event: Event) -> None:
        self.revision = revision
        self.event = event
        self._plain: bytes | None = None
        self._full: bytes | None = None

    def frame(self, prev_kv: bool) -> bytes:
        """The event as one of the field `events` of a WatchResponse, with or without the value before."""
        if prev_kv and self.event.HasField("prev_kv"):
            if self._full is None:
                self._full = _framed(self.event)
            return self._full
        if self._plain is None:
            event = self.event
            if event.HasField("prev_kv"):
                event = Event(type=event.type, kv=event.kv, expired=event.expired)
            self._plain = _framed(event)
        return self._plain


def varint(number: int) -> bytes:
    """A number as protobuf writes it; a negative one as 64 bits."""
    number &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _framed(event: Event) -> bytes:
    raw = event.SerializeToString()
    return _EVENTS_TAG + varint(len(raw)) + raw
