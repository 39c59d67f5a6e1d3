"""What replicas compare: the rolling hash, HashKV, and the canonical dump.

All are raftkv's own (BLAKE2b cut to size); etcd's hashes depend on its file format and cannot be equal to ours.

- The *rolling hash* is chained over the effects of each entry, in the order of the log: equal at equal applied index,
  however entries were grouped into writes, and never equal again after replicas differed once.
- *HashKV* covers what can be read at a revision and before: the index as of that revision, through the same steps as
  reads, and all records up to it, values included. Equal on replicas with equal (revision, compact revision), however
  far their sweeps are; but while one is going on it costs a look-up a key.
- The *dump* is everything replicated, in one canonical order.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterable, Iterator
from hashlib import blake2b

from raftkv.state.mvcc import Reader
from raftkv.state.results import HashKVResult, RefusalCode, Refused

_LINK = struct.Struct(">QQQ")  # hash before, entry's index, entry's term
_LENGTH = struct.Struct(">I")


def chain(rolling_hash: int, index: int, term: int, effects: Iterable[bytes]) -> int:
    """The rolling hash after an entry with these effects. 64 bits."""
    data = _LINK.pack(rolling_hash, index, term) + b"".join(effects)
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


def hash_kv_steps(reader: Reader, revision: int, step: int = 1000) -> Generator[None, None, HashKVResult]:
    """Compute HashKV, pausing (yield) after each `step` keys or records, so that others get their turn between.

    Args:
        reader: over a view, if anything is written in between.
        revision: 0 is the reader's latest.
    Raises:
        Refused: FUTURE_REVISION or COMPACTED, before the first pause.
    """
    revision = _check(reader, revision)
    digest = blake2b(digest_size=4)
    for number, (key, version) in enumerate(reader.walk(b"", None, revision), 1):
        digest.update(_LENGTH.pack(len(key)) + key + version)
        if not number % step:
            yield
    for number, (place, record) in enumerate(reader.records(revision), 1):
        digest.update(place + record)
        if not number % step:
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
    for key, version in reader.walk(b"", None, reader.revision):
        yield b"key " + key + version
    for place, record in reader.records(reader.revision):
        yield b"record " + place + record


def _check(reader: Reader, revision: int) -> int:
    # A negative revision is no revision at all; what is below the compact revision is gone.
    if revision < 0:
        raise Refused(reader.refusal(RefusalCode.COMPACTED))
    return reader.check_revision(revision)
