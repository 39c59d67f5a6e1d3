"""`txn`: one transaction from stdin, in etcdctl's own text form.

Three parts, each ended by an empty line (or the end of input): comparisons, then what to do if all hold, then what to
do otherwise.

    value("greeting") = "hello"
    mod("greeting") > "0"

    put greeting "good bye"
    get greeting

    del other --prefix
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

import click

from raftkv.cli import fields, kv
from raftkv.cli.guards import Guard, guard_option, guarded
from raftkv.cli.options import Settings, client_command
from raftkv.cli.ranges import key_bytes

if TYPE_CHECKING:
    from raftkv._pb import kv_pb2

_QUOTED = r'"(?:[^"\\]|\\.)*"|`[^`]*`'
_COMPARISON = re.compile(rf"\s*(\w+)\(\s*({_QUOTED})\s*\)\s*(\S+)\s*({_QUOTED})\s*", re.DOTALL)
_WORD = re.compile(rf"{_QUOTED}|'[^']*'|\S+", re.DOTALL)
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)", re.DOTALL)
_SIMPLE_ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}
_TARGETS = {"ver": "version", "c": "create", "m": "mod", "val": "value"}
_RESULTS = {"=": "EQUAL", ">": "GREATER", "<": "LESS", "!=": "NOT_EQUAL"}
_COMMANDS = {"put": kv.put, "get": kv.get, "del": kv.delete}


@click.command()
@click.option("-i", "--interactive", is_flag=True, help="Say which part is expected next.")
@guard_option
@client_command
def txn(settings: Settings, interactive: bool, guards: tuple[Guard, ...]) -> None:
    """Run one transaction, read from stdin.

    \b
    Comparisons, an empty line, what to do if all hold, an empty line, what to do otherwise:
        value("greeting") = "hello"
    \b
        put greeting "good bye"
    \b
        get greeting
    Targets: value, version (ver), create (c), mod (m), lease. Commands: put, get, del with their options.
    """
    from raftkv.cli import output
    from raftkv.cli.session import call
    from raftkv.client.methods import TXN
    from raftkv.client.routing import Purpose

    request = read_txn(sys.stdin.buffer, interactive=interactive or sys.stdin.isatty())
    if guards:
        response = guarded(settings, request, guards)
    else:
        read_only = all(op.HasField("request_range") for op in (*request.success, *request.failure))
        response = call(settings, TXN, request, Purpose.READ if read_only else Purpose.WRITE)
    if settings.output == "json":
        output.print_json(output.as_json(response))
    elif settings.output == "fields":
        fields.show(fields.txn(response))
    else:
        output.print_txn(response, hex_=settings.hex)


def read_txn(source: BinaryIO, *, interactive: bool = False) -> kv_pb2.TxnRequest:
    """Read the three parts.

    Raises:
        click.UsageError: a line is not understood; names it.
    """
    from raftkv._pb import kv_pb2

    def part(title: str) -> Iterator[str]:
        if interactive:
            click.echo(title)
        for line in iter(source.readline, b""):
            text = os.fsdecode(line.rstrip(b"\r\n"))
            if not text.strip():
                return
            yield text

    return kv_pb2.TxnRequest(
        compare=[comparison(line) for line in part("compares:")],
        success=[operation(line) for line in part("success requests (get, put, del):")],
        failure=[operation(line) for line in part("failure requests (get, put, del):")],
    )


def comparison(line: str) -> kv_pb2.Compare:
    """One line such as `mod("key") > "0"`."""
    from raftkv._pb import kv_pb2

    match = _COMPARISON.fullmatch(line)
    if match is None:
        raise click.UsageError(f'malformed comparison: {line}; expected TARGET("KEY") OPERATOR "VALUE"')
    target = _TARGETS.get(match[1], match[1])
    if match[3] not in _RESULTS:
        raise click.UsageError(f"malformed comparison: {line}; unknown operator {match[3]!r} (there are = != > <)")
    compare = kv_pb2.Compare(key=unquoted(match[2]), result=kv_pb2.Compare.CompareResult.Value(_RESULTS[match[3]]))
    value = unquoted(match[4])
    match target:
        case "value":
            compare.target = kv_pb2.Compare.VALUE
            compare.value = value
        case "version":
            compare.target = kv_pb2.Compare.VERSION
            compare.version = _number(value, line, 10)
        case "create":
            compare.target = kv_pb2.Compare.CREATE
            compare.create_revision = _number(value, line, 10)
        case "mod":
            compare.target = kv_pb2.Compare.MOD
            compare.mod_revision = _number(value, line, 10)
        case "lease":
            compare.target = kv_pb2.Compare.LEASE
            compare.lease = _number(value, line, 16)
        case _:
            raise click.UsageError(
                f"malformed comparison: {line}; unknown target {target!r} "
                "(there are value, version, create, mod, lease)"
            )
    return compare


def operation(line: str) -> kv_pb2.RequestOp:
    """One line such as `put key "a value" --prev-kv`, parsed by the command of that name."""
    from raftkv._pb import kv_pb2

    name, *arguments = words(line)
    command = _COMMANDS.get(name)
    if command is None:
        raise click.UsageError(f"malformed request: {line}; unknown command {name!r} (there are put, get, del)")
    try:
        values = command.make_context(name, arguments).params
    except click.UsageError as error:
        raise click.UsageError(f"malformed request: {line}; {error.format_message()}") from None
    if values.get("guards"):
        raise click.UsageError(f"malformed request: {line}; --guard is for the whole transaction: raftkv txn --guard …")
    key = values["key"]
    match name:
        case "put":
            if values["value"] is None and not values["ignore_value"]:
                raise click.UsageError(f"malformed request: {line}; the value is missing")
            return kv_pb2.RequestOp(request_put=kv.put_request(key, key_bytes(values["value"] or ""), values))
        case "get":
            return kv_pb2.RequestOp(request_range=kv.range_request(key, values["range_end"], values))
        case _:
            return kv_pb2.RequestOp(request_delete_range=kv.delete_request(key, values["range_end"], values))


def words(line: str) -> list[str]:
    """Split as etcdctl does: double quotes take escapes, single quotes and backquotes take none."""
    found = _WORD.findall(line)
    return [os.fsdecode(unquoted(word)) if word[0] in "\"'`" and len(word) > 1 else word for word in found]


def unquoted(text: str) -> bytes:
    """A quoted word's bytes; escapes as Go writes them, so that \\x00 is any byte."""
    body = os.fsencode(text[1:-1])
    return body if text[0] in "'`" else _ESCAPE.sub(_unescape, body)


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if code[:1] == b"x":
        return bytes([int(code[1:], 16)])
    if code[:1] in (b"u", b"U") and len(code) > 1:
        return chr(int(code[1:], 16)).encode()
    if len(code) == 3:
        return bytes([int(code, 8) & 255])
    return _SIMPLE_ESCAPES.get(code, code)


def _number(value: bytes, line: str, base: int) -> int:
    try:
        number = int(value, base)
    except ValueError:
        raise click.UsageError(
            f"malformed comparison: {line}; {shlex.quote(os.fsdecode(value))} is not a number"
        ) from None
    if not -(1 << 63) <= number < 1 << 63:
        raise click.UsageError(f"malformed comparison: {line}; {number} is beyond 64 bits")
    return number
