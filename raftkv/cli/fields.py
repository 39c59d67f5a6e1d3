"""How answers look under `-o fields`: etcdctl's form, a line `"Name" : value` for each field, quoted as Go does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from raftkv._pb import cluster_pb2, common_pb2, kv_pb2, lease_pb2, maintenance_pb2

_SHORT = {7: r"\a", 8: r"\b", 9: r"\t", 10: r"\n", 11: r"\v", 12: r"\f", 13: r"\r", 34: r"\"", 92: r"\\"}


def quoted(value: bytes | str) -> str:
    """As Go's %q: UTF-8 stays readable, what cannot be printed and what is not UTF-8 is escaped."""
    text = value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")
    return '"' + "".join(map(_quoted, text)) + '"'


def _quoted(character: str) -> str:
    code = ord(character)
    if code in _SHORT:
        return _SHORT[code]
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte that is not UTF-8
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def show(lines: Iterable[str]) -> None:
    """All lines of one answer, at once."""
    click.echo("".join(line + "\n" for line in lines).encode(), nl=False)


def _line(name: str, value: object) -> str:
    return f'"{name}" : {str(value).lower() if isinstance(value, bool) else value}'


def header(of: common_pb2.ResponseHeader) -> Iterator[str]:
    """What every answer begins with."""
    yield _line("ClusterID", of.cluster_id)
    yield _line("MemberID", of.member_id)
    yield _line("Revision", of.revision)
    yield _line("RaftTerm", of.raft_term)


# ---- keys and values ----


def key_value(kv: common_pb2.KeyValue, prefix: str = "") -> Iterator[str]:
    """One pair."""
    yield _line(f"{prefix}Key", quoted(kv.key))
    yield _line(f"{prefix}CreateRevision", kv.create_revision)
    yield _line(f"{prefix}ModRevision", kv.mod_revision)
    yield _line(f"{prefix}Version", kv.version)
    yield _line(f"{prefix}Value", quoted(kv.value))
    yield _line(f"{prefix}Lease", kv.lease)


def put(response: kv_pb2.PutResponse) -> Iterator[str]:
    """Of `put`."""
    yield from header(response.header)
    if response.HasField("prev_kv"):
        yield from key_value(response.prev_kv, "Prev")


def get(response: kv_pb2.RangeResponse) -> Iterator[str]:
    """Of `get`."""
    yield from header(response.header)
    for kv in response.kvs:
        yield from key_value(kv)
    yield _line("More", response.more)
    yield _line("Count", response.count)


def deleted(response: kv_pb2.DeleteRangeResponse) -> Iterator[str]:
    """Of `del`."""
    yield from header(response.header)
    yield _line("Deleted", response.deleted)
    for kv in response.prev_kvs:
        yield from key_value(kv, "Prev")


def txn(response: kv_pb2.TxnResponse) -> Iterator[str]:
    """Of `txn`."""
    yield from header(response.header)
    yield _line("Succeeded", response.succeeded)
    for each in response.responses:
        match each.WhichOneof("response"):
            case "response_put":
                yield from put(each.response_put)
            case "response_range":
                yield from get(each.response_range)
            case "response_delete_range":
                yield from deleted(each.response_delete_range)
            case "response_txn":
                yield from txn(each.response_txn)


def watch(of: common_pb2.ResponseHeader, events: Iterable[common_pb2.Event]) -> Iterator[str]:
    """Of `watch`: one answer of the stream."""
    yield from header(of)
    for event in events:
        yield _line("Type", "DELETE" if event.type else "PUT")
        if event.HasField("prev_kv"):
            yield from key_value(event.prev_kv, "Prev")
        yield from key_value(event.kv)


# ---- leases ----


def lease(
    response: lease_pb2.LeaseGrantResponse | lease_pb2.LeaseKeepAliveResponse | lease_pb2.LeaseTimeToLiveResponse,
) -> Iterator[str]:
    """Of `lease grant` and `lease keep-alive`; what `lease timetolive` begins with."""
    yield from header(response.header)
    yield _line("ID", response.ID)
    yield _line("TTL", response.TTL)


def time_to_live(response: lease_pb2.LeaseTimeToLiveResponse) -> Iterator[str]:
    """Of `lease timetolive`."""
    yield from lease(response)
    yield _line("GrantedTTL", response.grantedTTL)
    for key in response.keys:
        yield _line("Key", quoted(key))


def leases(response: lease_pb2.LeaseLeasesResponse) -> Iterator[str]:
    """Of `lease list`."""
    yield from header(response.header)
    for each in response.leases:
        yield _line("ID", each.ID)


# ---- the cluster ----


def members(response: cluster_pb2.MemberListResponse) -> Iterator[str]:
    """Of `member list`."""
    yield from header(response.header)
    for each in response.members:
        yield _line("ID", each.ID)
        yield _line("Name", quoted(each.name))
        for url in each.peerURLs:
            yield _line("PeerURL", quoted(url))
        for url in each.clientURLs:
            yield _line("ClientURL", quoted(url))
        yield _line("IsLearner", each.isLearner)
        yield ""


def status(endpoint: str, response: maintenance_pb2.StatusResponse) -> Iterator[str]:
    """Of `status`: one endpoint."""
    yield from header(response.header)
    yield _line("Version", quoted(response.version))
    yield _line("DBSize", response.dbSize)
    yield _line("Leader", response.leader)
    yield _line("IsLearner", response.isLearner)
    yield _line("RaftIndex", response.raftIndex)
    yield _line("RaftTerm", response.raftTerm)
    yield _line("RaftAppliedIndex", response.raftAppliedIndex)
    yield _line("Errors", f"[{' '.join(response.errors)}]")
    yield _line("Endpoint", quoted(endpoint))
    yield ""


def hash_kv(endpoint: str, response: maintenance_pb2.HashKVResponse) -> Iterator[str]:
    """Of `hash`: one endpoint."""
    yield from header(response.header)
    yield _line("Endpoint", quoted(endpoint))
    yield _line("Hash", response.hash)
    yield ""


def health(entry: Mapping[str, Any]) -> Iterator[str]:
    """Of `health`: one endpoint."""
    yield _line("Endpoint", quoted(entry["endpoint"]))
    yield _line("Health", entry["health"])
    yield _line("Took", entry["took"])
    yield _line("Error", entry.get("error", ""))
    yield ""


def alarms(of: common_pb2.ResponseHeader, found: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Of `alarm list` and `alarm disarm`: member and alarm."""
    yield from header(of)
    for member_id, name in found:
        yield _line("MemberID", member_id)
        yield _line("AlarmType", name)
        yield ""


def backup(hash_: int, revision: int, keys: int, size: int) -> Iterator[str]:
    """Of `snapshot status`."""
    yield _line("Hash", hash_)
    yield _line("Revision", revision)
    yield _line("Keys", keys)
    yield _line("Size", size)
