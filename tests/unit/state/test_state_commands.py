"""The bytes of an entry: what goes in comes out, and nothing else is taken for a batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.state.commands import (
    Command,
    CommandKind,
    Group,
    MalformedBatch,
    MalformedCall,
    decode_batch,
    decode_session_call,
    encode_batch,
    encode_session_call,
)

U64 = st.integers(0, 2**64 - 1)
COMMANDS = st.builds(Command, U64, st.integers(0, 255), st.binary(max_size=300))
GROUPS = st.lists(st.builds(Group, U64, U64, st.lists(COMMANDS, max_size=5).map(tuple)), max_size=4)


@given(GROUPS)
def test_a_batch_comes_back_as_it_was(groups: list[Group]) -> None:
    assert decode_batch(encode_batch(groups)) == groups


@given(GROUPS, st.data())
def test_a_part_of_a_batch_is_malformed(groups: list[Group], data: st.DataObject) -> None:
    encoded = encode_batch(groups)
    cut = data.draw(st.integers(1, len(encoded) - 1))
    with pytest.raises(MalformedBatch):
        decode_batch(encoded[:cut])
    with pytest.raises(MalformedBatch):
        decode_batch(encoded + b"\0")


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_are_a_batch_or_malformed(data: bytes) -> None:
    try:
        groups = decode_batch(data)
    except MalformedBatch:
        return
    assert encode_batch(groups) == data


def test_an_empty_entry_has_no_groups() -> None:
    assert decode_batch(b"") == []


def test_the_layout_does_not_change() -> None:
    batch = [Group(1, 2, (Command(3, CommandKind.PUT, b"ab"), Command(4, CommandKind.MEMBER_ATTR, b"")))]
    assert encode_batch(batch).hex() == (
        "0101000000010000000000000002000000000000000200000"
        "003000000000000000102000000040000000000000020000000006162"
    )  # fmt: skip


@given(U64, U64, U64, st.integers(0, 255), st.binary(max_size=300))
def test_a_call_of_a_session_comes_back_as_it_was(
    session: int, seq: int, first_incomplete: int, kind: int, payload: bytes
) -> None:
    call = session, seq, first_incomplete, kind, payload
    assert decode_session_call(encode_session_call(*call)) == call


@pytest.mark.parametrize("size", range(25))
def test_a_call_that_is_cut_off_before_its_payload_is_malformed(size: int) -> None:
    call = encode_session_call(1 << 40, 2, 1, CommandKind.PUT, b"")
    assert decode_session_call(call)[4] == b""
    with pytest.raises(MalformedCall):
        decode_session_call(call[:size])


def test_the_layout_of_a_call_does_not_change() -> None:
    call = encode_session_call(1, 2, 3, CommandKind.PUT, b"ab")
    assert call.hex() == "010000000000000002000000000000000300000000000000016162"


def test_a_version_from_the_future_is_named() -> None:
    with pytest.raises(MalformedBatch, match="version 2; this node knows 1"):
        decode_batch(b"\x02\0\0\0\0")


def test_an_absurd_count_costs_nothing() -> None:
    with pytest.raises(MalformedBatch):
        decode_batch(b"\x01\xff\xff\xff\xff")
    with pytest.raises(MalformedBatch):
        decode_batch(b"\x01\x01\0\0\0" + b"\0" * 16 + b"\xff\xff\xff\xff" + b"\0" * 100)


@pytest.mark.parametrize(
    ("kind", "number"), [("PUT", 1), ("DELETE_RANGE", 2), ("TXN", 3), ("COMPACT", 4), ("MEMBER_ATTR", 32)]
)
def test_numbers_of_kinds_are_for_ever(kind: str, number: int) -> None:
    assert CommandKind[kind] == number
