"""What replicas compare: the rolling hash, HashKV, and the canonical dump.

All are raftkv's own (BLAKE2b cut to size); etcd's hashes depend on its file format and cannot be equal to ours.

- The *rolling hash* is chained over the effects of each entry, in the order of the log: equal at equal applied index,
  however entries were grouped into writes, and never equal again after replicas differed once.
- *HashKV* covers what can be read: the keys at a revision, through the same indexes as reads, and the changes since the
  compact revision. Equal on replicas with equal (revision, compact revision), however far their sweeps are.
- The *dump* is everything replicated, in one canonical order.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterable, Iterator
from hashlib import blake2b

from raftkv.state.keys import PLACE, RECORD
from raftkv.state.mvcc import Reader
from raftkv.state.results import HashKVResult, RefusalCode, Refused

_LINK = struct.Struct(">QQQ")  # hash before, entry's index, entry's term
_LENGTHS = struct.Struct(">II")


def chain(rolling_hash: int, index: int, term: int, effects: Iterable[bytes]) -> int:
    """The rolling hash after an entry with these effects. 64 bits."""
    data = _LINK.pack(rolling_hash, index, term) + b"".join(effects)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def hash_kv_steps(reader: Reader, revision: int, step: int = 1000) -> Generator[None, None, HashKVResult]:
    """Compute HashKV, pausing (yield) after each `step` keys, so that a thread or a loop can do other things between.

    Args:
        reader: over a view, if anything is written in between.
        revision: 0 is the reader's latest.
    Raises:
        Refused: FUTURE_REVISION or COMPACTED, before the first pause.
    """
    revision = _check(reader, revision)
    digest = blake2b(digest_size=4)
    left = step
    for key, version in reader.walk(b"", None, revision):
        value = reader.value(key, version)
        digest.update(_LENGTHS.pack(len(key), len(value)) + key + version + value)
        left -= 1
        if not left:
            left = step
            yield
    for stored, record in _changes_after_compaction(reader, revision):
        digest.update(stored + record)
        left -= 1
        if not left:
            left = step
            yield
    return HashKVResult(int.from_bytes(digest.digest(), "big"), reader.compact_revision, revision)


def hash_kv(reader: Reader, revision: int) -> HashKVResult:
    """HashKV in one go. Raises as `hash_kv_steps`."""
    steps = hash_kv_steps(reader, revision, step=1 << 62)
    try:
        next(steps)
    except StopIteration as stop:
        result: HashKVResult = stop.value
        return result
    raise AssertionError("the steps did not end")


def dump(reader: Reader, head: bytes, members: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """All that is replicated, as canonical bytes: equal states give identical sequences, whatever is swept.

    Args:
        head: the fixed-size part of the state.
        members: in the order of their ids, with what they published.
    """
    yield b"state " + head
    for member_id, attributes in members:
        yield b"member " + member_id.to_bytes(8, "big") + attributes
    if reader.compact_revision > 0:
        for key, version in reader.walk(b"", None, reader.compact_revision):
            value = reader.value(key, version)
            yield b"key " + _LENGTHS.pack(len(key), len(value)) + key + version + value
    for stored, record in _changes_after_compaction(reader, reader.revision):
        yield b"change " + stored + record


def _changes_after_compaction(reader: Reader, revision: int) -> Iterator[tuple[bytes, bytes]]:
    first = max(reader.compact_revision, 0) + 1
    return reader.iterate(RECORD + PLACE.pack(first, 0), RECORD + PLACE.pack(revision + 1, 0))


def _check(reader: Reader, revision: int) -> int:
    # A negative revision is no revision at all; what is below the compact revision is gone.
    if revision < 0:
        raise Refused(reader.refusal(RefusalCode.COMPACTED))
    return reader.check_revision(revision)
