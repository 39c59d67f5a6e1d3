"""Keys: text or bytes in, bytes out; ranges; and the namespace a client may be confined to."""

from __future__ import annotations

from typing import Final, TypeAlias

from raftkv._pb import common_pb2
from raftkv.client.errors import InvalidRequest
from raftkv.client.results import KeyValue

Text: TypeAlias = str | bytes
"""Keys and values: bytes, or text that is encoded as UTF-8."""

FROM_KEY: Final = b"\0"
"""As the end of a range: everything from its start on."""


def to_bytes(value: Text, what: str) -> bytes:
    """Encode `value`; TypeError names `what` where it is neither text nor bytes."""
    if type(value) is bytes:
        return value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"{what} must be str or bytes, not {type(value).__name__}")


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with `prefix`."""
    trimmed = prefix.rstrip(b"\xff")
    if not trimmed:
        return FROM_KEY  # nothing is greater than all 0xff; and every key begins with b""
    return trimmed[:-1] + bytes((trimmed[-1] + 1,))


class Namespace:
    """A prefix that all keys of a client get, and lose again in its answers."""

    __slots__ = ("prefix",)

    def __init__(self, prefix: bytes) -> None:
        self.prefix: Final = prefix

    def key(self, key: Text, what: str = "key") -> bytes:
        """One key; an empty one is refused here, because with a prefix the server would not notice."""
        bare = to_bytes(key, what)
        if not bare:
            raise InvalidRequest("etcdserver: key is not provided", code="KEY_NOT_PROVIDED")
        return self.prefix + bare

    def span(self, key: Text, end: Text | None, prefix: bool) -> tuple[bytes, bytes]:
        """(key, range_end) on the wire for one key, `[key, end)`, or all keys that begin with `key`."""
        if prefix:
            if end is not None:
                raise InvalidRequest("a range has either an end or prefix=True", code="INVALID_RANGE")
            bare = to_bytes(key, "key")
            whole = self.prefix + bare
            # The smallest key there is stands in for "from the beginning".
            return whole or FROM_KEY, prefix_end(whole)
        if end is None:
            return self.key(key), b""
        bare_end = to_bytes(end, "end")
        if not bare_end:
            raise InvalidRequest("the end of a range must not be empty", code="INVALID_RANGE")
        start = self.prefix + to_bytes(key, "key")
        if not self.prefix:
            return start or FROM_KEY, bare_end
        return start, prefix_end(self.prefix) if bare_end == FROM_KEY else self.prefix + bare_end

    def item(self, kv: common_pb2.KeyValue) -> KeyValue:
        """The typed form of what the server sent."""
        key = kv.key
        return KeyValue(
            key[len(self.prefix) :] if self.prefix else key,
            kv.value,
            kv.create_revision,
            kv.mod_revision,
            kv.version,
            kv.lease,
        )
