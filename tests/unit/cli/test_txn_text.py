"""The text form of a transaction, as etcdctl reads it."""

from __future__ import annotations

import io

import click
import pytest

from raftkv._pb import kv_pb2
from raftkv.cli.txn import comparison, operation, read_txn, words


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('value("k") = "v"', kv_pb2.Compare(key=b"k", target="VALUE", result="EQUAL", value=b"v")),
        ('val("k") != "a b"', kv_pb2.Compare(key=b"k", target="VALUE", result="NOT_EQUAL", value=b"a b")),
        ('mod("k") > "0"', kv_pb2.Compare(key=b"k", target="MOD", result="GREATER", mod_revision=0)),
        ('m("k") < "7"', kv_pb2.Compare(key=b"k", target="MOD", result="LESS", mod_revision=7)),
        ('create("k") = "0"', kv_pb2.Compare(key=b"k", target="CREATE", result="EQUAL", create_revision=0)),
        ('c("k") = "-1"', kv_pb2.Compare(key=b"k", target="CREATE", result="EQUAL", create_revision=-1)),
        ('ver("k") = "2"', kv_pb2.Compare(key=b"k", target="VERSION", result="EQUAL", version=2)),
        ('version("k")="2"', kv_pb2.Compare(key=b"k", target="VERSION", result="EQUAL", version=2)),
        ('lease("k") = "ff"', kv_pb2.Compare(key=b"k", target="LEASE", result="EQUAL", lease=255)),
        (
            r'value("a\"b\x00") = "\n\u00e9"',
            kv_pb2.Compare(key=b'a"b\0', target="VALUE", result="EQUAL", value="\né".encode()),
        ),
        ("value(`a\\b`) = `c`", kv_pb2.Compare(key=b"a\\b", target="VALUE", result="EQUAL", value=b"c")),
    ],
)
def test_comparisons(line: str, expected: kv_pb2.Compare) -> None:
    assert comparison(line) == expected


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("bogus", "malformed comparison: bogus"),
        ('value("k") == "v"', "unknown operator '=='"),
        ('size("k") = "1"', "unknown target 'size'"),
        ('mod("k") = "x"', "x is not a number"),
        ('mod("k") = "9223372036854775808"', "is beyond 64 bits"),
        ("mod(k) = 1", "malformed comparison"),
    ],
)
def test_malformed_comparisons_are_named(line: str, text: str) -> None:
    with pytest.raises(click.UsageError) as raised:
        comparison(line)
    assert text in raised.value.message


def test_operations_take_the_options_of_the_commands() -> None:
    assert operation('put k "a b" --prev-kv').request_put == kv_pb2.PutRequest(key=b"k", value=b"a b", prev_kv=True)
    assert operation("put k ''").request_put == kv_pb2.PutRequest(key=b"k")
    assert operation("get a --prefix --limit 2").request_range == kv_pb2.RangeRequest(key=b"a", range_end=b"b", limit=2)
    assert operation("get a c --order DESCEND").request_range == kv_pb2.RangeRequest(
        key=b"a", range_end=b"c", sort_order="DESCEND"
    )
    assert operation("del a --from-key").request_delete_range == kv_pb2.DeleteRangeRequest(key=b"a", range_end=b"\0")


@pytest.mark.parametrize("line", ["lease grant 5", "put k", "get", "get k --nonsense", "put k v --lease=zz"])
def test_malformed_operations_are_named(line: str) -> None:
    with pytest.raises(click.UsageError, match=r"malformed request|lease id"):
        operation(line)


def test_the_three_parts_end_with_an_empty_line_or_the_end() -> None:
    text = b'mod("k") > "0"\n\nput k v\nget k\n\ndel k\n'
    request = read_txn(io.BytesIO(text))
    assert (len(request.compare), len(request.success), len(request.failure)) == (1, 2, 1)
    assert read_txn(io.BytesIO(b"")) == kv_pb2.TxnRequest()
    assert len(read_txn(io.BytesIO(b"\n\r\nget k\r\n")).failure) == 1


def test_words() -> None:
    assert words(r"""put "a \"b" 'c d' e""") == ["put", 'a "b', "c d", "e"]


def test_bytes_that_are_no_text_pass_through() -> None:
    request = read_txn(io.BytesIO(b'\nput \xff\xfe "\\x80"\n'))
    assert request.success[0].request_put == kv_pb2.PutRequest(key=b"\xff\xfe", value=b"\x80")
