"""What `watch` does: the SDK's watch, with the messages themselves kept for showing."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import click

from raftkv._pb import common_pb2, watch_pb2
from raftkv.cli import fields, output
from raftkv.cli.options import Settings
from raftkv.cli.session import client_of, run
from raftkv.client import Compacted, RaftkvError, WatchBatch
from raftkv.client.watch import WATCH_ID, Feed, Watch

KINDS = {common_pb2.Event.PUT: "PUT", common_pb2.Event.DELETE: "DELETE"}


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown(WatchBatch):
    """A batch as it came."""

    messages: tuple[common_pb2.Event, ...] = ()
    header: common_pb2.ResponseHeader = dataclasses.field(default_factory=common_pb2.ResponseHeader)


class _Feed(Feed):
    header = common_pb2.ResponseHeader()  # the last that came, whatever it came with

    async def _take(self, response: watch_pb2.WatchResponse, endpoint: str) -> bool:
        self.header = response.header
        return await super()._take(response, endpoint)

    def batch(self, events: Sequence[common_pb2.Event], revision: int, header: common_pb2.ResponseHeader) -> WatchBatch:
        plain = super().batch(events, revision, header)
        return _Shown(plain.events, plain.revision, tuple(events), header)


Reaction = Callable[[common_pb2.Event, common_pb2.ResponseHeader], Awaitable[None]]
"""What is to be done for each event once it is shown."""


def follow(settings: Settings, request: watch_pb2.WatchCreateRequest, *, progress: bool) -> None:
    """Show what happens until it is interrupted. Raises as the SDK's watch does."""
    run(following(settings, request, progress))


async def following(
    settings: Settings, request: watch_pb2.WatchCreateRequest, progress: bool, react: Reaction | None = None
) -> None:
    """As `follow`."""
    # Told about progress even when nobody wants to see it: or a watch that matches nothing would resume from long ago.
    request.progress_notify = True
    request.watch_id = WATCH_ID
    async with client_of(settings) as client:
        context = client._context
        feed = _Feed(context.pool, context.namespace, request)
        try:
            async with Watch(context.pool, feed, settings.timeout_s, progress) as watch:
                async for batch in watch.batches():
                    assert isinstance(batch, _Shown), "the feed makes no others"
                    show(batch.messages, batch.header, settings, revision=batch.revision)
                    if react is not None:
                        for event in batch.messages:
                            await react(event, batch.header)
        except Compacted as error:
            if settings.output == "json":
                output.print_json(_answer([], feed.header, compacted=error.compact_revision))
            elif settings.output == "fields":
                fields.show(fields.watch(feed.header, []))
            raise _compacted(error) from error


def _compacted(error: Compacted) -> click.ClickException | RaftkvError:
    if not error.compact_revision:
        return error
    return click.ClickException(
        f"{error.message}: watch from --rev {error.compact_revision} on, or read what there is now with 'raftkv get'"
    )


def show(
    events: Sequence[common_pb2.Event], header: common_pb2.ResponseHeader, settings: Settings, *, revision: int
) -> None:
    """One answer, as etcdctl shows it; without events it is a sign of progress."""
    if settings.output == "json":
        output.print_json(_answer([output.as_json(event) for event in events], header))
    elif settings.output == "fields":
        if not events:
            click.echo(f"progress notify: {revision}")
        fields.show(fields.watch(header, events))
    elif not events:
        click.echo(f"progress notify: {revision}")
    elif settings.output == "table":
        output.print_table(
            ("EVENT", "KEY", "VALUE", "REVISION", "BEFORE"), [_row(each, settings.hex) for each in events]
        )
    else:
        click.echo(b"".join(_lines(each, settings.hex) for each in events), nl=False)


def _answer(events: list[dict[str, Any]], header: common_pb2.ResponseHeader, compacted: int = 0) -> dict[str, Any]:
    # etcdctl shows Go's own struct here, not the message: other names, nothing left out.
    return {
        "Header": output.as_json(header),
        "Events": events,
        "CompactRevision": compacted,
        "Canceled": bool(compacted),
        "Created": False,
    }


def _lines(event: common_pb2.Event, hex_: bool) -> bytes:
    lines = [KINDS[event.type].encode()]
    if event.HasField("prev_kv"):
        lines += [event.prev_kv.key, event.prev_kv.value]
    lines += [event.kv.key, event.kv.value]
    kind, *rest = lines
    return b"\n".join([kind, *(output.shown_bytes(each, hex_=hex_) for each in rest), b""])


def _row(event: common_pb2.Event, hex_: bool) -> tuple[str, ...]:
    return (
        "EXPIRE" if event.expired else KINDS[event.type],
        output.cell(event.kv.key, hex_=hex_),
        output.cell(event.kv.value, hex_=hex_),
        str(event.kv.mod_revision),
        output.cell(event.prev_kv.value, hex_=hex_) if event.HasField("prev_kv") else "",
    )
