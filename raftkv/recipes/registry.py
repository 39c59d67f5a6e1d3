"""A registry of services: who serves what and where, as long as they are alive.

    registry = Registry(client)
    async with registry.register("billing", "10.0.0.7:8080", metadata={"zone": "b"}):
        ...                                               # registered while this runs, and the process lives
    for instance in await registry.instances("billing"):
        print(instance.address)
    async for instances in registry.follow("billing"):    # now, and whenever it changes
        ...

An instance is the key `<name>/.registry/<service>/<id>`, bound to a lease, its value JSON. Unlike what is locked, being
registered needs no body to be cancelled: when the lease is lost, the instance is told and registers itself again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from raftkv.client import (
    DEFAULT,
    AsyncClient,
    Closed,
    Compacted,
    ConditionFailed,
    ConfigError,
    Get,
    InvalidRequest,
    Key,
    KeyValue,
    LockLost,
    Put,
    RaftkvError,
    RangeResult,
)
from raftkv.client.keys import Text
from raftkv.client.lease import check_ttl
from raftkv.client.options import TimeoutArg
from raftkv.client.txn import Branches
from raftkv.recipes.holding import Place
from raftkv.recipes.names import prefix_of

LOG: Final = logging.getLogger("raftkv")
PAUSE_MIN_S: Final = 0.1
PAUSE_MAX_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance of a service, as registered."""

    service: str
    id: str
    address: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """The value of its key."""
        return json.dumps({"address": self.address, "metadata": dict(self.metadata)}, sort_keys=True).encode()


class Registry:
    """A registry on a name.

    Args:
        client: of raftkv or etcd.
        name: all who use the same name share it.
    """

    def __init__(self, client: AsyncClient, name: Text = "services") -> None:
        self._client = client
        self._root = prefix_of(name, "registry")

    def register(
        self,
        service: str,
        address: str,
        *,
        id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        ttl: float = 10.0,
    ) -> Registration:
        """Be found: `async with registry.register("billing", "10.0.0.7:8080"):`.

        Args:
            service: its name, without "/".
            address: where it is, in whatever form those who look for it understand.
            id: of this instance, without "/"; None makes one up. Entering raises ConditionFailed (code INSTANCE_TAKEN)
                while another instance has it.
            metadata: text by text, for those who look.
            ttl: seconds after which an instance that is not heard of any more is gone.
        """
        own_id = secrets.token_hex(8) if id is None else id
        instance = Instance(_part("service", service), _part("id", own_id), address, dict(metadata or {}))
        return Registration(self._client, self._key(instance), instance, ttl)

    async def instances(self, service: str, *, timeout: TimeoutArg = DEFAULT) -> tuple[Instance, ...]:
        """The instances of a service now, by id."""
        prefix = self._root + _part("service", service).encode() + b"/"
        found = await self._client.range(prefix, prefix=True, serializable=False, timeout=timeout)
        return _sorted({item.key: self._instance(item) for item in found})

    async def services(self, *, timeout: TimeoutArg = DEFAULT) -> tuple[str, ...]:
        """The services that have an instance now."""
        found = await self._client.range(self._root, prefix=True, keys_only=True, serializable=False, timeout=timeout)
        return tuple(sorted({item.key.removeprefix(self._root).split(b"/")[0].decode() for item in found}))

    async def follow(self, service: str) -> AsyncIterator[tuple[Instance, ...]]:
        """The instances now, and again after every change. Ends when the client is closed.

        What came and went between two changes seen may be left out; the latest is never. It survives what a watch
        survives, and lost history too.
        """
        prefix = self._root + _part("service", service).encode() + b"/"
        last: tuple[Instance, ...] | None = None
        while True:
            found = await self._client.range(prefix, prefix=True, serializable=False)
            known = {item.key: self._instance(item) for item in found}
            if (now := _sorted(known)) != last:
                last = now
                yield now
            watch = self._client.watch(prefix, prefix=True, start_revision=found.revision + 1)
            try:
                async for batch in watch.batches():
                    for event in batch:
                        if event.kind == "put":
                            known[event.key] = self._instance(event.item)
                        else:
                            known.pop(event.key, None)
                    if (now := _sorted(known)) != last:
                        last = now
                        yield now
            except Compacted:
                continue
            except Closed:
                return
            finally:
                watch.stop()
            return

    def _key(self, instance: Instance) -> bytes:
        return self._root + instance.service.encode() + b"/" + instance.id.encode()

    def _instance(self, item: KeyValue) -> Instance | None:
        """None where somebody else wrote something else there."""
        service, _, id = item.key.removeprefix(self._root).decode(errors="replace").partition("/")
        try:
            value = item.json()
            metadata = {str(name): str(text) for name, text in value["metadata"].items()}
            return Instance(service, id, str(value["address"]), metadata)
        except (ValueError, LookupError, TypeError, AttributeError):
            return None


class Registration:
    """An instance being registered; made by `Registry.register`.

    Attributes:
        registered: set while it is certainly registered.
        lost: set while it is not: the lease was lost, or somebody deleted the key. It is trying to come back.
        losses: how often that happened.
        failure: why its last attempt to come back failed; None while it is registered. The first of a kind is logged.
    """

    def __init__(self, client: AsyncClient, key: bytes, instance: Instance, ttl_s: float) -> None:
        check_ttl(ttl_s)
        self._client = client
        self._key = key
        self._instance = instance
        self._ttl_s = ttl_s
        self._leases: set[int] = set()  # all that were ours
        self._place: Place | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # between coming back and changing what is said
        self.registered: Final = asyncio.Event()
        self.lost: Final = asyncio.Event()
        self.losses = 0
        self.failure: RaftkvError | None = None

    @property
    def instance(self) -> Instance:
        """What is registered."""
        return self._instance

    async def update(self, *, address: str | None = None, metadata: Mapping[str, str] | None = None) -> None:
        """Change what is said; what is left out stays.

        Raises:
            LockLost: it is not registered at this moment; when it is again, it will be with the new.
            InvalidRequest: it is too large, or not permitted; what was said stays.
            OutcomeUnknown, Unavailable: as in `put`; repeating it is harmless.
        """
        async with self._turn:
            old = self._instance
            self._instance = Instance(
                old.service,
                old.id,
                old.address if address is None else address,
                old.metadata if metadata is None else dict(metadata),
            )
            place = self._place
            if place is None:
                raise LockLost(f"instance {old.id!r} of {old.service!r} is not registered", code="LOCK_LOST")
            mine = Key(self._key).create_revision == place.fence
            put = Put(self._key, self._instance.to_json(), lease=place.lease.id)
            try:
                result = await place.commit(Branches((mine,), (put,)))
            except InvalidRequest:
                self._instance = old  # or it could never come back with it
                raise
            if not result.succeeded:
                place.lose("its key is gone")
                raise place.error()

    async def __aenter__(self) -> Self:
        if self._keeper is not None:
            raise ConfigError("registration", "it is registered by this very object")
        await self._come()
        self._keeper = asyncio.create_task(self._keep(), name=f"raftkv instance {self._instance.id}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait((keeper,))
        place, self._place = self._place, None
        self.registered.clear()
        if place is None:
            return
        if error is None or isinstance(error, Exception):
            try:
                await place.leave()
            except RaftkvError:
                return  # it is gone with its lease
        else:
            place.abandon()

    async def _come(self) -> None:
        """Be registered, under a new lease."""
        async with self._turn:
            place = Place(self._client, self._ttl_s, b"")
            place.key = self._key
            try:
                await place.open()
                self._leases.add(place.lease.id)
                await self._put(place)
                place.hold()
            except BaseException:
                place.abandon()
                raise
            self._place = place
            self.failure = None
            self.lost.clear()
            self.registered.set()

    async def _put(self, place: Place) -> None:
        key, put = Key(self._key), Put(self._key, self._instance.to_json(), lease=place.lease.id)
        expected = 0
        while True:
            unchanged = key.mod_revision == expected
            result = await place.commit(Branches((unchanged,), (put, Get(self._key)), (Get(self._key),)))
            found = result.results[-1]
            assert isinstance(found, RangeResult), "a transaction answers each operation in its kind"
            item = found.items[0] if found.items else None
            if result.succeeded or (item is not None and item.lease == place.lease.id):
                place.took(found)
                return
            if item is not None and item.lease not in self._leases:
                text = f"instance {self._instance.id!r} of {self._instance.service!r} is registered by somebody else"
                error = ConditionFailed(text, code="INSTANCE_TAKEN")
                error.key = self._key
                error.current = item
                raise error
            expected = item.mod_revision if item is not None else 0  # of a lease that we lost, but the key is there yet

    async def _keep(self) -> None:
        failures = 0
        while True:
            if (place := self._place) is not None:
                await place.lost.wait()
                self._place = None
                self.losses += 1
                failures = 0
                self.registered.clear()
                self.lost.set()
                place.abandon()
            try:
                await self._come()
            except Closed:
                return
            except RaftkvError as error:
                # Even what can never succeed as sent: an update may mend it, or whoever gives permissions.
                self._failed(error)
                pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** min(failures, 10))
                failures += 1
                await asyncio.sleep(random.uniform(pause_s / 2, pause_s))

    def _failed(self, error: RaftkvError) -> None:
        before, self.failure = self.failure, error
        if type(before) is not type(error):
            instance = self._instance
            LOG.warning(
                "raftkv registry: instance %r of %r cannot come back yet: %s", instance.id, instance.service, error
            )


def _part(name: str, value: str) -> str:
    if not value or "/" in value:
        raise ConfigError(name, f"{value!r} must not be empty, nor contain '/'")
    return value


def _sorted(known: Mapping[bytes, Instance | None]) -> tuple[Instance, ...]:
    return tuple(instance for _, instance in sorted(known.items(), key=lambda entry: entry[0]) if instance is not None)
