"""RangeRequest to RangeResponse.

The order of work is etcd's: read at the revision, drop what the revision filters exclude, sort, cut to the limit.
`count` is the number of keys in the range before all of that, so a small limit still walks the keys, but reads the
values of those it returns only.
"""

from __future__ import annotations

from collections.abc import Iterator

from raftkv._pb.kv_pb2 import RangeRequest, RangeResponse
from raftkv.state.keys import VERSION, span
from raftkv.state.mvcc import Reader

_SORT_FIELD = {RangeRequest.VERSION: 3, RangeRequest.CREATE: 2, RangeRequest.MOD: 0}
"""Where VERSION.unpack has what is sorted by."""


class RangeTooLong(Exception):
    """More keys than the caller wanted to spend on in this place; it reads them elsewhere (a thread, over a view)."""


def read_range(
    reader: Reader, request: RangeRequest, response: RangeResponse | None = None, *, walk_max: int | None = None
) -> RangeResponse:
    """Serve a range read.

    Args:
        response: an empty one to fill in, where it is a part of something; by default a new one.
        walk_max: give up after so many keys, before any value is read; None for no bound.
    Returns:
        The response; of the header only `revision`, the store's (not the one read at).
    Raises:
        Refused: FUTURE_REVISION or COMPACTED.
        RangeTooLong: there are more than `walk_max` keys.

    Same as etcd v3 `Range`.
    """
    revision = reader.check_revision(request.revision)
    if response is None:
        response = RangeResponse()
    response.header.revision = reader.revision
    key = request.key
    if not request.range_end:
        version = reader.find(key, revision)
        if version is None:
            return response
        response.count = 1
        if not request.count_only and (not _has_filters(request) or _passes(request, version)):
            reader.fill(response.kvs.add(), key, version, b"" if request.keys_only else reader.value(key, version))
        return response

    start, stop = span(key, request.range_end)
    found = reader.walk(start, stop, revision)
    if request.count_only:
        response.count = _count(found, walk_max)
        return response
    pairs, response.count = _collect(found, _fetch_limit(request), walk_max)
    if len(pairs) == response.count:
        reader.walked(start, stop, revision, pairs)
    if _has_filters(request):
        pairs = [pair for pair in pairs if _passes(request, pair[1])]
    pairs = _sort(reader, request, pairs)
    limit = request.limit
    if 0 < limit < len(pairs):
        del pairs[limit:]
        response.more = True
    add = response.kvs.add
    values = [b""] * len(pairs) if request.keys_only else reader.values(pairs)
    for (key, version), value in zip(pairs, values, strict=True):
        reader.fill(add(), key, version, value)
    return response


def _has_filters(request: RangeRequest) -> bool:
    return bool(
        request.min_mod_revision
        or request.max_mod_revision
        or request.min_create_revision
        or request.max_create_revision
    )


def _passes(request: RangeRequest, version: bytes) -> bool:
    mod_revision, _, create_revision, _, _ = VERSION.unpack(version)
    return not (
        (request.max_mod_revision and mod_revision > request.max_mod_revision)
        or (request.min_mod_revision and mod_revision < request.min_mod_revision)
        or (request.max_create_revision and create_revision > request.max_create_revision)
        or (request.min_create_revision and create_revision < request.min_create_revision)
    )


def _fetch_limit(request: RangeRequest) -> int:
    """How many keys to keep for sorting; 0 for all. One more than asked for, to know of `more`.

    As etcd: sort_target alone (sort_order NONE) does not count as sorting here, so such a request sorts the first keys
    of the range rather than the whole of it.
    """
    limit = request.limit
    if limit <= 0 or request.sort_order != RangeRequest.NONE or _has_filters(request):
        return 0
    return limit + 1


def _collect(
    found: Iterator[tuple[bytes, bytes]], keep: int, walk_max: int | None
) -> tuple[list[tuple[bytes, bytes]], int]:
    """The first `keep` of the pairs (0: all) and how many there are."""
    if not keep and walk_max is None:
        pairs = list(found)
        return pairs, len(pairs)
    pairs = []
    for pair in found:
        pairs.append(pair)
        if len(pairs) == keep:
            break
        if walk_max is not None and len(pairs) > walk_max:
            raise RangeTooLong
    return pairs, len(pairs) + _count(found, None if walk_max is None else walk_max - len(pairs))


def _count(found: Iterator[tuple[bytes, bytes]], walk_max: int | None) -> int:
    if walk_max is None:
        return sum(1 for _ in found)
    count = 0
    for _ in found:
        count += 1
        if count > walk_max:
            raise RangeTooLong
    return count


def _sort(reader: Reader, request: RangeRequest, pairs: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Sorted as asked; keys with equal sort values stay in key order, in both directions."""
    target = request.sort_target
    descending = request.sort_order == RangeRequest.DESCEND
    if target == RangeRequest.VALUE:
        valued = sorted(zip(reader.values(pairs), pairs, strict=True), key=lambda each: each[0], reverse=descending)
        return [pair for _, pair in valued]
    place = _SORT_FIELD.get(target)
    if place is not None:
        return sorted(pairs, key=lambda pair: VERSION.unpack(pair[1])[place], reverse=descending)
    if descending:
        pairs.reverse()
    return pairs
