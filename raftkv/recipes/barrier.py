"""A barrier: closed by somebody, waited at by many, opened for all at once.

    barrier = Barrier(client, "migration")
    await barrier.close()
    ...                                # others: await barrier.wait()
    await barrier.open()

It is the key `<name>/.barrier/closed`. Bound to a lease (`close(lease=...)`) it opens by itself when whoever closed it
is gone; without one it stays closed until somebody opens it.
"""

from __future__ import annotations

from raftkv.client import DEFAULT, AsyncClient, ConditionFailed, DeadlineExceeded
from raftkv.client.keys import Text, to_bytes
from raftkv.client.options import TimeoutArg, check_seconds
from raftkv.recipes.names import prefix_of
from raftkv.recipes.waiting import changed, is_delete, limited


class Barrier:
    """A barrier on a name.

    Args:
        client: of raftkv or etcd.
        name: all who use the same name share it.
    """

    def __init__(self, client: AsyncClient, name: Text) -> None:
        self._client = client
        self._name = name
        self._key = prefix_of(name, "barrier") + b"closed"

    async def close(self, *, owner: Text = b"", lease: int = 0, timeout: TimeoutArg = DEFAULT) -> bool:
        """Close it. Whether it was open before.

        Args:
            owner: stored as the key's value, for people to see.
            lease: it opens when this lease ends; 0 for none.
            timeout: as in `put`.
        Raises:
            LeaseNotFound, OutcomeUnknown, Unavailable: as in `put`.
        """
        try:
            await self._client.put(self._key, to_bytes(owner, "owner"), lease=lease, if_absent=True, timeout=timeout)
        except ConditionFailed as error:
            if error.code != "CONDITION_FAILED":
                raise
            return False
        return True

    async def open(self, *, timeout: TimeoutArg = DEFAULT) -> bool:
        """Open it, for all who wait. Whether it was closed before.

        Raises:
            OutcomeUnknown, Unavailable: as in `delete`.
        """
        return (await self._client.delete(self._key, timeout=timeout)).deleted > 0

    async def is_closed(self, *, timeout: TimeoutArg = DEFAULT) -> bool:
        """Whether it is closed now."""
        return await self._client.get(self._key, serializable=False, timeout=timeout) is not None

    async def wait(self, *, timeout: float | None = None) -> None:
        """Return when it is open, or was so at some moment since this was called.

        Args:
            timeout: seconds; None waits for ever.
        Raises:
            DeadlineExceeded: it was closed all the time.
            Unavailable: the cluster could not be asked.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        async with limited(timeout, DeadlineExceeded, f"barrier {self._name!r} was not opened", "BARRIER_CLOSED"):
            found = await self._client.range(self._key, keys_only=True, serializable=False)
            while found.items:
                closed = found.items[0].create_revision
                await changed(self._client.watch(self._key, start_revision=found.revision + 1), is_delete)
                found = await self._client.range(self._key, keys_only=True, serializable=False)
                if found.items and found.items[0].create_revision != closed:
                    return  # opened, and closed again
