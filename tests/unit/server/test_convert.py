"""Every message between nodes survives the wire whole."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from raftkv._pb import raft_pb2
from raftkv.raft import messages as m
from raftkv.raft.types import ConfState, Entry, EntryKind, SnapshotMeta
from raftkv.replica.effects import Forward
from raftkv.server import convert
from raftkv.state.commands import Command

ENTRIES = (Entry(8, 3, EntryKind.NORMAL, b"data"), Entry(9, 3, EntryKind.CONF_CHANGE, b""))


def filled(kind: type) -> object:
    """One of `kind` in which no field has its default."""
    values = {}
    for number, field in enumerate(dataclasses.fields(kind), start=1):
        hint = typing.get_type_hints(kind)[field.name]
        values[field.name] = True if hint is bool else ENTRIES if field.name == "entries" else number << 40
    return kind(**values)


KINDS = [kind for kind in typing.get_args(m.Message) if kind is not m.InstallSnapshot]  # that one is made on arrival


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_field_is_lost(kind: type) -> None:
    message = filled(kind)
    raw = convert.to_batch([message]).SerializeToString()  # type: ignore[list-item]
    assert convert.from_batch(raft_pb2.PeerBatch.FromString(raw)) == [message]


def test_forwarded_commands() -> None:
    forward = Forward(3, 1 << 60, (Command(1, 1, b"put"), Command(2, 200, b"")))
    raw = convert.to_batch([forward]).SerializeToString()
    assert convert.from_batch(raft_pb2.PeerBatch.FromString(raw)) == [forward]


def test_a_kind_of_a_later_version_is_passed_over_and_an_entry_of_one_is_not() -> None:
    batch = raft_pb2.PeerBatch()
    batch.messages.add()
    assert convert.from_batch(batch) == []
    batch.messages.add().append.entries.add(index=1, term=1, kind=77)
    with pytest.raises(ValueError, match="77"):
        convert.from_batch(batch)


def test_snapshot_meta() -> None:
    meta = SnapshotMeta(7, 3, ConfState((1, 2), (1, 3), (4,), (3,), auto_leave=True))
    assert convert.meta_from_wire(convert.meta_to_wire(meta)) == meta
