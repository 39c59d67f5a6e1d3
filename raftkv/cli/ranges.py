"""What a key on the command line means: bytes as the shell gave them, and the ranges that flags make of them."""

from __future__ import annotations

import os

import click


def key_bytes(text: str) -> bytes:
    """The argument's own bytes: what is not UTF-8 stays as it came."""
    return os.fsencode(text)


def range_of(key: str, range_end: str | None, *, prefix: bool, from_key: bool) -> tuple[bytes, bytes]:
    """(key, range_end) as etcd's API has them; an empty range_end is one key, b"\\0" every key from `key` on.

    Raises:
        click.UsageError: flags that exclude each other.
    """
    if prefix and from_key:
        raise click.UsageError("--prefix and --from-key exclude each other; choose one")
    if range_end is not None and (prefix or from_key):
        flag = "--prefix" if prefix else "--from-key"
        raise click.UsageError(f"{flag} takes one key; leave out the range end {range_end!r}")
    start = key_bytes(key)
    if from_key:
        return start or b"\0", b"\0"
    if prefix:
        return (start, prefix_end(start)) if start else (b"\0", b"\0")
    return start, key_bytes(range_end) if range_end is not None else b""


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys with this prefix; b"\\0" (no end) where there is none."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\0"
