"""How answers look: etcdctl's `simple`, `json` and `table`, and colour where there is a terminal for it."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from raftkv._pb import kv_pb2

_OWN_FIELDS_FROM = 100  # ours, not etcd's: left out of what must equal etcdctl's JSON

COLOURS = {"leader": "green", "exited": "red", "silent": "red", "paused": "yellow", "no leader": "yellow"}


def coloured() -> bool:
    """Whether stdout takes colour: a terminal, and the user has not said NO_COLOR."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, **how: Any) -> str:
    """`click.style`, where stdout takes colour."""
    return click.style(text, **how) if coloured() else text


# ---- json ----


def as_json(message: Message) -> dict[str, Any]:
    """A message as Go's encoding/json shows etcd's structs: proto names, unset fields left out, bytes in base64,
    64-bit numbers as numbers, enums as numbers, a oneof as an object of its own."""
    shown: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.number >= _OWN_FIELDS_FROM:
            continue
        oneof = field.containing_oneof
        if oneof is not None:
            shown[_go_name(oneof.name)] = {_go_name(field.name): _json_value(value)}
        else:
            shown[field.name] = _json_value(value)
    return shown


def _json_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, (str, int, float)):
        return value
    if hasattr(value, "ListFields"):
        return as_json(value)
    return [_json_value(each) for each in value]


def _go_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def base64_list(values: Iterable[bytes]) -> list[str]:
    """Go's form of a list of bytes."""
    return [base64.b64encode(value).decode() for value in values]


def print_json(value: Any) -> None:
    """One line, as Go writes it."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":  # Go escapes these; they can only stand inside strings
        text = text.replace(character, f"\\u{ord(character):04x}")
    click.echo(text)


# ---- tables ----


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """etcdctl's table: framed, heads centred, columns of numbers and words to the left or right by their look."""
    click.echo(framed(head, rows))


def framed(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The table as text."""
    lines = [list(row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines, strict=True)]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    shown = [
        rule,
        "|" + "|".join(f" {_centred(cell, width)} " for cell, width in zip(head, widths, strict=True)) + "|",
        rule,
    ]
    shown += [
        "|" + "|".join(f" {cell.rjust(width)} " for cell, width in zip(row, widths, strict=True)) + "|" for row in lines
    ]
    return "\n".join([*shown, rule])


def _centred(cell: str, width: int) -> str:
    left = (width - len(cell)) // 2  # str.center puts an odd blank to the left, etcdctl to the right
    return " " * left + cell + " " * (width - len(cell) - left)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """A plain table for people: columns apart by two blanks. Styled cells are aligned by what one sees."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(click.unstyle(line[i])) for line in lines) for i in range(len(head))]

    def pad(i: int, cell: str) -> str:
        blanks = " " * (widths[i] - len(click.unstyle(cell)))
        return blanks + cell if i in right else cell + blanks

    return ["  ".join(pad(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines]


def bytes_text(count: int | None) -> str:
    """A size as etcdctl writes it: 20 kB, 1.5 MB (powers of ten)."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


# ---- simple ----


def shown_bytes(value: bytes, *, hex_: bool) -> bytes:
    """As etcdctl: raw, or every byte as \\x00."""
    return b"".join(b"\\x%02x" % byte for byte in value) if hex_ else value


def print_kv(kv: kv_pb2.KeyValue, *, hex_: bool, value_only: bool = False) -> None:
    """Key and value, a line each."""
    if not value_only:
        click.echo(shown_bytes(kv.key, hex_=hex_))
    click.echo(shown_bytes(kv.value, hex_=hex_))


def print_put(response: kv_pb2.PutResponse, *, hex_: bool) -> None:
    """OK, and the previous pair if there is one."""
    click.echo("OK")
    if response.HasField("prev_kv"):
        print_kv(response.prev_kv, hex_=hex_)


def print_range(response: kv_pb2.RangeResponse, *, hex_: bool, value_only: bool = False) -> None:
    """All pairs."""
    for kv in response.kvs:
        print_kv(kv, hex_=hex_, value_only=value_only)


def print_deleted(response: kv_pb2.DeleteRangeResponse, *, hex_: bool) -> None:
    """How many, and the previous pairs if asked for."""
    click.echo(str(response.deleted))
    for kv in response.prev_kvs:
        print_kv(kv, hex_=hex_)


def print_txn(response: kv_pb2.TxnResponse, *, hex_: bool) -> None:
    """SUCCESS or FAILURE, then each answer after a blank line."""
    click.echo("SUCCESS" if response.succeeded else "FAILURE")
    for each in response.responses:
        click.echo("")
        match each.WhichOneof("response"):
            case "response_put":
                print_put(each.response_put, hex_=hex_)
            case "response_range":
                print_range(each.response_range, hex_=hex_)
            case "response_delete_range":
                print_deleted(each.response_delete_range, hex_=hex_)
            case "response_txn":
                print_txn(each.response_txn, hex_=hex_)


def cell(value: bytes, *, hex_: bool) -> str:
    """Bytes in a table: on one line, whatever they are."""
    shown = shown_bytes(value, hex_=hex_).decode("utf-8", "backslashreplace")
    return shown if shown.isprintable() else repr(shown)[1:-1]


def print_kv_table(kvs: Iterable[kv_pb2.KeyValue], *, hex_: bool) -> None:
    """The pairs with their revisions."""
    print_table(
        ("KEY", "VALUE", "CREATED", "MODIFIED", "VERSION", "LEASE"),
        [
            (
                cell(kv.key, hex_=hex_),
                cell(kv.value, hex_=hex_),
                str(kv.create_revision),
                str(kv.mod_revision),
                str(kv.version),
                f"{kv.lease:x}" if kv.lease else "",
            )
            for kv in kvs
        ],
    )


def header_of(response: Any) -> Mapping[str, Any]:
    """The header alone, as JSON."""
    return as_json(response.header)
