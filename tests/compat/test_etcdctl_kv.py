"""Debian's etcdctl reads and writes keys, with every flag it has for that."""

from __future__ import annotations

import base64
import json

import pytest

from raftkv._pb import kv_pb2
from tests.compat.clusters import Etcdctl

pytestmark = [pytest.mark.system, pytest.mark.integration]


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def revision(etcdctl: Etcdctl) -> int:
    found: int = etcdctl.json("get", "no such key")["header"]["revision"]
    return found


@pytest.fixture
def abc(etcdctl: Etcdctl, prefix: str) -> str:
    """Keys a, b, c under the test's prefix, with values 3, 1, 2; b written three times. The prefix."""
    for key, value in (("b", "x"), ("b", "y"), ("b", "1"), ("c", "2"), ("a", "3")):
        assert etcdctl("put", f"{prefix}{key}", value) == "OK\n"
    return prefix


def keys(output: str, prefix: str) -> str:
    """The keys of a `--keys-only` answer, without their prefix: `a b c`."""
    return " ".join(line.removeprefix(prefix) for line in output.split())


# put


def test_put_then_get(etcdctl: Etcdctl, prefix: str) -> None:
    assert etcdctl("put", f"{prefix}k", "v") == "OK\n"
    assert etcdctl("get", f"{prefix}k") == f"{prefix}k\nv\n"


def test_put_reads_the_value_from_stdin(etcdctl: Etcdctl, prefix: str) -> None:
    assert etcdctl("put", f"{prefix}k", stdin="from stdin") == "OK\n"
    assert etcdctl("get", f"{prefix}k", "--print-value-only") == "from stdin\n"


def test_put_gives_the_previous_pair(etcdctl: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}k", "one")
    assert etcdctl("put", f"{prefix}k", "two", "--prev-kv") == f"OK\n{prefix}k\none\n"
    assert etcdctl("put", f"{prefix}new", "two", "--prev-kv") == "OK\n"


def test_put_keeps_the_value(etcdctl: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}k", "kept")
    etcdctl("put", f"{prefix}k", "--ignore-value")
    pair = etcdctl.json("get", f"{prefix}k")["kvs"][0]
    assert (pair["value"], pair["version"]) == (b64("kept"), 2)


def test_put_keeps_the_lease(etcdctl: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}k", "v")
    etcdctl("put", f"{prefix}k", "w", "--ignore-lease")
    assert etcdctl("get", f"{prefix}k", "--print-value-only") == "w\n"


@pytest.mark.parametrize("flag", ["--ignore-value", "--ignore-lease"])
def test_put_cannot_keep_what_is_not_there(etcdctl: Etcdctl, prefix: str, flag: str) -> None:
    value = [] if flag == "--ignore-value" else ["v"]
    assert "etcdserver: key not found" in etcdctl.refused("put", f"{prefix}missing", *value, flag)


def test_put_under_an_unknown_lease(etcdctl: Etcdctl, prefix: str) -> None:
    before = revision(etcdctl)
    assert "etcdserver: requested lease not found" in etcdctl.refused("put", f"{prefix}k", "v", "--lease=1234")
    assert etcdctl("get", f"{prefix}k") == ""
    assert revision(etcdctl) == before


def test_put_without_a_key(etcdctl: Etcdctl) -> None:
    assert "etcdserver: key is not provided" in etcdctl.refused("put", "", "v")


def test_put_counts_one_revision(etcdctl: Etcdctl, prefix: str) -> None:
    before = revision(etcdctl)
    first = etcdctl.json("put", f"{prefix}k", "v")["header"]["revision"]
    second = etcdctl.json("put", f"{prefix}k", "v")["header"]["revision"]
    assert (first, second) == (before + 1, before + 2)


def test_put_of_a_value_that_is_too_large(etcdctl: Etcdctl, prefix: str) -> None:
    before = revision(etcdctl)
    refusal = etcdctl.refused("put", f"{prefix}k", stdin="x" * (1536 * 1024 + 1))
    assert "etcdserver: request is too large" in refusal
    assert revision(etcdctl) == before


def test_values_are_bytes(etcdctl: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}k", "ü\tß")
    assert etcdctl("get", f"{prefix}k", "--print-value-only") == "ü\tß\n"
    hexed = etcdctl("get", f"{prefix}k", "--hex")
    assert hexed.splitlines()[1] == "".join(f"\\x{byte:02x}" for byte in "ü\tß".encode())


# get


def test_get_of_a_missing_key(etcdctl: Etcdctl, prefix: str) -> None:
    assert etcdctl("get", f"{prefix}missing") == ""


def test_get_a_prefix(etcdctl: Etcdctl, abc: str) -> None:
    assert etcdctl("get", abc, "--prefix") == f"{abc}a\n3\n{abc}b\n1\n{abc}c\n2\n"


def test_get_values_only(etcdctl: Etcdctl, abc: str) -> None:
    assert etcdctl("get", abc, "--prefix", "--print-value-only") == "3\n1\n2\n"


def test_get_keys_only(etcdctl: Etcdctl, abc: str) -> None:
    assert etcdctl("get", abc, "--prefix", "--keys-only") == f"{abc}a\n\n{abc}b\n\n{abc}c\n\n"


def test_get_a_range_excludes_its_end(etcdctl: Etcdctl, abc: str) -> None:
    assert keys(etcdctl("get", f"{abc}a", f"{abc}c", "--keys-only"), abc) == "a b"
    assert etcdctl("get", f"{abc}c", f"{abc}a", "--keys-only") == ""
    assert etcdctl("get", f"{abc}a", f"{abc}a", "--keys-only") == ""


def test_get_from_a_key_on(etcdctl: Etcdctl, abc: str) -> None:
    found = etcdctl("get", f"{abc}b", "--from-key", "--keys-only").split()
    assert found[:2] == [f"{abc}b", f"{abc}c"]
    assert found == sorted(found)


def test_get_everything(etcdctl: Etcdctl, abc: str) -> None:
    found = etcdctl("get", "", "--prefix", "--keys-only").split()
    assert {f"{abc}a", f"{abc}b", f"{abc}c"} <= set(found)
    assert found == sorted(found)


def test_get_with_a_limit(etcdctl: Etcdctl, abc: str) -> None:
    answer = etcdctl.json("get", abc, "--prefix", "--limit=2")
    assert (len(answer["kvs"]), answer["count"], answer["more"]) == (2, 3, True)
    answer = etcdctl.json("get", abc, "--prefix", "--limit=3")
    assert (len(answer["kvs"]), answer["count"], "more" in answer) == (3, 3, False)


@pytest.mark.parametrize(
    ("target", "order", "expected"),
    [
        ("KEY", "ASCEND", "a b c"),
        ("KEY", "DESCEND", "c b a"),
        ("VALUE", "ASCEND", "b c a"),
        ("VALUE", "DESCEND", "a c b"),
        ("CREATE", "ASCEND", "b c a"),
        ("CREATE", "DESCEND", "a c b"),
        ("MODIFY", "ASCEND", "b c a"),
        ("MODIFY", "DESCEND", "a c b"),
        ("VALUE", "", "b c a"),
        ("", "DESCEND", "c b a"),
    ],
)
def test_get_sorted(etcdctl: Etcdctl, abc: str, target: str, order: str, expected: str) -> None:
    flags = [f"--sort-by={target}"] * bool(target) + [f"--order={order}"] * bool(order)
    assert keys(etcdctl("get", abc, "--prefix", "--keys-only", *flags), abc) == expected


def test_get_sorted_by_version_cuts_after_sorting(etcdctl: Etcdctl, abc: str) -> None:
    flags = ("--sort-by=VERSION", "--order=DESCEND", "--limit=1")
    assert keys(etcdctl("get", abc, "--prefix", "--keys-only", *flags), abc) == "b"


def test_get_at_a_past_revision(etcdctl: Etcdctl, prefix: str) -> None:
    first = etcdctl.json("put", f"{prefix}k", "one")["header"]["revision"]
    second = etcdctl.json("put", f"{prefix}k", "two")["header"]["revision"]
    etcdctl("del", f"{prefix}k")
    assert etcdctl("get", f"{prefix}k", "--print-value-only", f"--rev={first}") == "one\n"
    assert etcdctl("get", f"{prefix}k", "--print-value-only", f"--rev={second}") == "two\n"
    assert etcdctl("get", f"{prefix}k", f"--rev={first - 1}") == ""
    assert etcdctl("get", f"{prefix}k") == ""


def test_get_at_a_future_revision(etcdctl: Etcdctl, prefix: str) -> None:
    refusal = etcdctl.refused("get", f"{prefix}k", f"--rev={revision(etcdctl) + 1000}")
    assert "etcdserver: mvcc: required revision is a future revision" in refusal


def test_get_serializable_from_every_member(etcdctl: Etcdctl, abc: str) -> None:
    for endpoint in etcdctl.endpoints:
        one = Etcdctl((endpoint,))
        # A linearizable read first: it returns only when this member has applied the keys.
        assert one("get", f"{abc}a", "--print-value-only") == "3\n"
        assert one("get", f"{abc}a", "--print-value-only", "--consistency=s") == "3\n"


def test_get_as_json(etcdctl: Etcdctl, prefix: str) -> None:
    put = etcdctl.json("put", f"{prefix}k", "v")["header"]
    answer = etcdctl.json("get", f"{prefix}k")
    assert answer["kvs"] == [
        {
            "key": b64(f"{prefix}k"),
            "create_revision": put["revision"],
            "mod_revision": put["revision"],
            "version": 1,
            "value": b64("v"),
        }
    ]
    assert answer["count"] == 1
    header = answer["header"]
    assert header["cluster_id"] == put["cluster_id"]
    assert header["member_id"]
    assert header["raft_term"] == put["raft_term"]


def test_get_as_fields(etcdctl: Etcdctl, prefix: str) -> None:
    at = etcdctl.json("put", f"{prefix}k", "v")["header"]["revision"]
    fields = dict(line.split(" : ", 1) for line in etcdctl("get", f"{prefix}k", "-w", "fields").splitlines() if line)
    assert fields['"Key"'] == json.dumps(f"{prefix}k")
    assert fields['"Value"'] == '"v"'
    assert (fields['"CreateRevision"'], fields['"ModRevision"'], fields['"Version"']) == (str(at), str(at), "1")
    assert (fields['"Lease"'], fields['"More"'], fields['"Count"']) == ("0", "false", "1")


def test_get_as_protobuf_is_readable_with_our_messages(etcdctl: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}k", "v")
    answer = kv_pb2.RangeResponse.FromString(etcdctl.raw("get", f"{prefix}k", "-w", "protobuf"))
    assert [(pair.key, pair.value) for pair in answer.kvs] == [(f"{prefix}k".encode(), b"v")]


# del


def test_del_counts(etcdctl: Etcdctl, abc: str) -> None:
    assert etcdctl("del", f"{abc}a") == "1\n"
    assert etcdctl("del", f"{abc}a") == "0\n"
    assert etcdctl("del", abc, "--prefix") == "2\n"


def test_del_a_range(etcdctl: Etcdctl, abc: str) -> None:
    assert etcdctl("del", f"{abc}a", f"{abc}c") == "2\n"
    assert keys(etcdctl("get", abc, "--prefix", "--keys-only"), abc) == "c"


def test_del_gives_the_previous_pairs(etcdctl: Etcdctl, abc: str) -> None:
    assert etcdctl("del", abc, "--prefix", "--prev-kv") == f"3\n{abc}a\n3\n{abc}b\n1\n{abc}c\n2\n"


def test_del_from_a_key_on(etcdctl: Etcdctl) -> None:
    for key in ("\U0010fffe", "\U0010ffff"):  # nothing sorts after these
        etcdctl("put", key, "v")
    assert etcdctl("del", "\U0010fffe", "--from-key") == "2\n"


def test_del_of_nothing_is_no_revision(etcdctl: Etcdctl, prefix: str) -> None:
    before = revision(etcdctl)
    assert etcdctl.json("del", f"{prefix}missing")["header"]["revision"] == before


def test_a_key_begins_anew_after_a_delete(etcdctl: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}k", "v")
    etcdctl("put", f"{prefix}k", "v")
    etcdctl("del", f"{prefix}k")
    at = etcdctl.json("put", f"{prefix}k", "v")["header"]["revision"]
    pair = etcdctl.json("get", f"{prefix}k")["kvs"][0]
    assert (pair["create_revision"], pair["mod_revision"], pair["version"]) == (at, at, 1)


# txn


def txn(compare: str, success: str, failure: str = "") -> str:
    return f"{compare}\n\n{success}\n\n{failure}\n\n"


def test_txn_takes_the_branch_that_holds(etcdctl: Etcdctl, prefix: str) -> None:
    story = txn(f'ver("{prefix}k") = "0"', f"put {prefix}k first", f"get {prefix}k")
    assert etcdctl("txn", stdin=story) == "SUCCESS\n\nOK\n"
    assert etcdctl("txn", stdin=story) == f"FAILURE\n\n{prefix}k\nfirst\n"


def test_txn_interactive(etcdctl: Etcdctl, prefix: str) -> None:
    out = etcdctl("txn", "-i", stdin=txn(f'ver("{prefix}k") = "0"', f"put {prefix}k v"))
    assert out.startswith("compares:\n")
    assert "SUCCESS\n\nOK\n" in out


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        ('val("{k}") = "b"', True),
        ('val("{k}") != "b"', False),
        ('val("{k}") > "a"', True),
        ('val("{k}") < "a"', False),
        ('ver("{k}") = "2"', True),
        ('ver("{k}") > "2"', False),
        ('create("{k}") > "0"', True),
        ('mod("{k}") = "0"', False),
        ('val("{missing}") = ""', False),
        ('val("{missing}") != "x"', False),
        ('val("{missing}") < "x"', False),
        ('ver("{missing}") = "0"', True),
        ('create("{missing}") < "1"', True),
        ('mod("{missing}") = "0"', True),
    ],
)
def test_txn_compares(etcdctl: Etcdctl, compare: str, holds: bool) -> None:
    etcdctl("del", "txn-compare/k")
    etcdctl("put", "txn-compare/k", "a")
    etcdctl("put", "txn-compare/k", "b")
    question = compare.format(k="txn-compare/k", missing="txn-compare/missing")
    assert etcdctl("txn", stdin=txn(question, "get txn-compare/none")).startswith("SUCCESS" if holds else "FAILURE")


def test_txn_needs_every_compare(etcdctl: Etcdctl, abc: str) -> None:
    both = f'val("{abc}a") = "3"\nval("{abc}b") = "{{}}"'
    assert etcdctl("txn", stdin=txn(both.format("1"), f"get {abc}c")).startswith("SUCCESS")
    assert etcdctl("txn", stdin=txn(both.format("2"), f"get {abc}c")).startswith("FAILURE")


def test_txn_sees_its_own_writes_at_one_revision(etcdctl: Etcdctl, abc: str) -> None:
    operations = f"put {abc}d 4\nget {abc} --prefix --keys-only\ndel {abc}a\nget {abc} --prefix --keys-only"
    out = etcdctl("txn", stdin=txn(f'ver("{abc}d") = "0"', operations))
    assert out.split() == ["SUCCESS", "OK", *(abc + key for key in "abcd"), "1", *(abc + key for key in "bcd")]
    at = etcdctl.json("get", f"{abc}d")["kvs"][0]["mod_revision"]
    assert etcdctl.json("get", abc, "--prefix", f"--rev={at}")["count"] == 3
    assert etcdctl.json("get", abc, "--prefix", f"--rev={at - 1}")["count"] == 3


def test_txn_cannot_put_a_key_twice(etcdctl: Etcdctl, prefix: str) -> None:
    before = revision(etcdctl)
    twice = txn(f'ver("{prefix}k") = "0"', f"put {prefix}k 1\nput {prefix}k 2")
    assert "etcdserver: duplicate key given in txn request" in etcdctl.refused("txn", stdin=twice)
    inside = txn(f'ver("{prefix}k") = "0"', f"put {prefix}k 1\ndel {prefix} --prefix")
    assert "etcdserver: duplicate key given in txn request" in etcdctl.refused("txn", stdin=inside)
    assert revision(etcdctl) == before


def test_txn_is_limited_to_128_operations(etcdctl: Etcdctl, prefix: str) -> None:
    puts = [f"put {prefix}{i} v" for i in range(129)]
    question = f'ver("{prefix}0") = "0"'
    refusal = etcdctl.refused("txn", stdin=txn(question, "\n".join(puts)))
    assert "etcdserver: too many operations in txn request" in refusal
    assert etcdctl("txn", stdin=txn(question, "\n".join(puts[:128]))).startswith("SUCCESS")
    assert etcdctl.json("get", prefix, "--prefix", "--limit=1")["count"] == 128


def test_txn_of_reads_is_no_revision(etcdctl: Etcdctl, abc: str) -> None:
    before = revision(etcdctl)
    answer = etcdctl.json("txn", stdin=txn(f'ver("{abc}a") > "0"', f"get {abc}a", f"get {abc}b"))
    assert answer["succeeded"] is True
    assert answer["header"]["revision"] == before


# compaction


def test_compaction_forgets_history_below_its_revision(etcdctl: Etcdctl, prefix: str) -> None:
    first = etcdctl.json("put", f"{prefix}k", "one")["header"]["revision"]
    second = etcdctl.json("put", f"{prefix}k", "two")["header"]["revision"]
    third = etcdctl.json("put", f"{prefix}k", "three")["header"]["revision"]
    assert etcdctl("compaction", str(second)) == f"compacted revision {second}\n"
    compacted = "etcdserver: mvcc: required revision has been compacted"
    assert compacted in etcdctl.refused("get", f"{prefix}k", f"--rev={first}")
    assert etcdctl("get", f"{prefix}k", "--print-value-only", f"--rev={second}") == "two\n"
    assert etcdctl("get", f"{prefix}k", "--print-value-only", f"--rev={third}") == "three\n"
    assert compacted in etcdctl.refused("compaction", str(second))
    future = "etcdserver: mvcc: required revision is a future revision"
    assert future in etcdctl.refused("compaction", str(third + 1000))


def test_compaction_waits_for_the_disk(etcdctl: Etcdctl, prefix: str) -> None:
    etcdctl("put", f"{prefix}k", "one")
    second = etcdctl.json("put", f"{prefix}k", "two")["header"]["revision"]
    assert etcdctl("compaction", str(second), "--physical") == f"compacted revision {second}\n"
    assert etcdctl("get", f"{prefix}k", "--print-value-only") == "two\n"
