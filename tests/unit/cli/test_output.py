"""How answers look. The expected texts are etcdctl's own."""

from __future__ import annotations

import pytest

from raftkv._pb import cluster_pb2, kv_pb2
from raftkv.cli import output
from raftkv.cli.cluster import readable, table_lines
from raftkv.cli.fields import quoted
from raftkv.cli.ranges import prefix_end, range_of
from raftkv.local.status import NodeRow


def test_json_is_as_go_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    response = kv_pb2.TxnResponse(succeeded=True)
    response.header.cluster_id = 10101560796677756362
    response.header.revision = 18
    response.header.leader = 7  # our own field: etcdctl shows none
    response.responses.add().response_put.header.revision = 18
    get = response.responses.add().response_range
    get.kvs.add(key=b"x", create_revision=15, mod_revision=18, version=3, value=b"k2")
    get.count = 1
    response.responses.add().response_delete_range.SetInParent()
    output.print_json(output.as_json(response))
    assert capsys.readouterr().out == (
        '{"header":{"cluster_id":10101560796677756362,"revision":18},"succeeded":true,"responses":['
        '{"Response":{"ResponsePut":{"header":{"revision":18}}}},'
        '{"Response":{"ResponseRange":{"kvs":[{"key":"eA==","create_revision":15,"mod_revision":18,"version":3,'
        '"value":"azI="}],"count":1}}},'
        '{"Response":{"ResponseDeleteRange":{}}}]}\n'
    )


def test_json_escapes_what_go_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json(output.as_json(cluster_pb2.Member(name="<é&>", peerURLs=["http://a"])))
    assert capsys.readouterr().out == '{"name":"\\u003cé\\u0026\\u003e","peerURLs":["http://a"]}\n'


def test_a_table_is_framed_as_etcdctls() -> None:
    assert output.framed(("ENDPOINT", "HASH"), [("127.0.0.1:31379", "2128421443")]).splitlines() == [
        "+-----------------+------------+",
        "|    ENDPOINT     |    HASH    |",
        "+-----------------+------------+",
        "| 127.0.0.1:31379 | 2128421443 |",
        "+-----------------+------------+",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"", '""'),
        (b'a "b" \\', r'"a \"b\" \\"'),
        ("é € 😀".encode(), '"é € 😀"'),
        (b"\a\b\f\n\r\t\v\0\x1f\x7f", r'"\a\b\f\n\r\t\v\x00\x1f\x7f"'),
        (b"\xff\xe2\x82", r'"\xff\xe2\x82"'),
        (b"\xed\xa0\x80", r'"\xed\xa0\x80"'),
        ("\u00a0\u2028\ufeff\U000e0001".encode(), r'"\u00a0\u2028\ufeff\U000e0001"'),
        ("\ufffd".encode(), '"\ufffd"'),
    ],
)
def test_words_are_quoted_as_go_quotes_them(value: bytes, text: str) -> None:
    assert quoted(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (20480, "20 kB"), (1_530_000_000, "1.5 GB")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert output.bytes_text(count) == text


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"a", b"b"), (b"a\xff", b"b"), (b"\xff\xff", b"\0"), (b"a\x00", b"a\x01"), (b"", b"\0")]
)
def test_prefix_end(prefix: bytes, end: bytes) -> None:
    assert prefix_end(prefix) == end


def test_ranges() -> None:
    assert range_of("a", None, prefix=False, from_key=False) == (b"a", b"")
    assert range_of("a", "c", prefix=False, from_key=False) == (b"a", b"c")
    assert range_of("", None, prefix=True, from_key=False) == (b"\0", b"\0")
    assert range_of("", None, prefix=False, from_key=True) == (b"\0", b"\0")
    assert range_of("k", None, prefix=False, from_key=True) == (b"k", b"\0")


def test_hex_is_etcdctls() -> None:
    assert output.shown_bytes(b"a\x00", hex_=True) == rb"\x61\x00"
    assert output.shown_bytes(b"a\x00", hex_=False) == b"a\x00"


def test_the_node_table_shows_what_the_process_is() -> None:
    rows = [
        NodeRow(
            "n1", "running", "leader", "h:1", "h:2", pid=5, term=2, commit=9, applied=9, lag=0, rss_bytes=50_000_000
        ),
        NodeRow("n2", "exited", "silent", "h:3", "h:4", exit_code=-9),
        NodeRow("n3", "exited", "silent", "h:5", "h:6", exit_code=70),
        NodeRow("n4", "paused", "silent", "h:7", "h:8", pid=6),
    ]
    lines = table_lines(rows)
    assert lines[1].split() == ["n1", "leader", "5", "h:1", "2", "9", "9", "0", "50", "MB"]
    assert "exited (SIGKILL)" in lines[2]
    assert "exited (70)" in lines[3]
    assert "paused" in lines[4]


def test_log_lines_are_made_readable_and_others_left_alone() -> None:
    line = '{"event": "became_leader", "level": "info", "ts": "2026-01-01T00:00:00Z", "node": "n1", "term": 2}'
    assert readable(line) == "2026-01-01T00:00:00Z info    became_leader node=n1 term=2"
    for other in ("Traceback (most recent call last):", "[1, 2]", '{"no": "event"}', ""):
        assert readable(other) == other
