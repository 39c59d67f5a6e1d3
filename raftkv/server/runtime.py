"""The loop of one node: time, disk, peers and callers around one `Replica`.

The way of a put, top to bottom in this file and the next room each: `propose` (a service hands in the request's
bytes) -> `_turn` (everything that arrived in this turn of the loop becomes one batch) -> `Replica.take` (an entry, or
one message to the leader) -> `Disk` and `Peers.send`, side by side -> `on_messages` (acknowledgements) ->
`_apply` (the committed entries, one LevelDB write) -> `Callers.answer` (the callers' futures).

One turn runs without waiting: nobody else runs between what it reads and what it does. What it sends has left the
process before it writes, and before it applies: the others work at the same time.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from raftkv.raft.errors import RaftRefused
from raftkv.raft.messages import InstallSnapshot
from raftkv.raft.ready import Event
from raftkv.raft.types import EntryKind, NodeId, Role, SnapshotMeta
from raftkv.replica.effects import Apply, Effects, Persist
from raftkv.replica.replica import Replica
from raftkv.server.asks import LeaseAnswer, LeaseAsk
from raftkv.server.callers import Callers, Waiter
from raftkv.server.compaction import Compaction
from raftkv.server.config import NodeConfig
from raftkv.server.convert import PeerMessage
from raftkv.server.disk import Disk
from raftkv.server.errors import Stopping, TransferTimeout
from raftkv.server.evidence import Evidence
from raftkv.server.lease_port import LeasePort, is_done
from raftkv.server.leasing import Leasing
from raftkv.server.lessor import LeaseLeft
from raftkv.server.peers import Peers
from raftkv.server.services.contract import Mark, MemberFacts, NodeStatus, SpooledSnapshot
from raftkv.server.snapshots import SnapshotSender
from raftkv.server.stores import Stores
from raftkv.server.ticking import Ticker
from raftkv.state.commands import CommandKind
from raftkv.state.machine import StateMachine
from raftkv.state.results import Result
from raftkv.state.store import StoreDamaged
from raftkv.storage.errors import StoreUnusable

EXPIRE_ROUNDS = 2  # of ticks
HEALTH_ROUNDS = 10
SWEEP_CHANGES = 100
LEARN_KEYS = 500
TIDY_SHARE = 0.2
"""Of each tick, for taking out what was compacted and for learning the keys that were there at the start: enough to
keep up with any rate of writes, and no caller notices."""
UNAPPLIED_BYTES_MAX = 1 << 20
"""Of committed entries that wait to be applied; more are applied at once."""


class Runtime:
    """One node at work; services and transport call only this. All of it belongs to one event loop."""

    def __init__(self, config: NodeConfig, stores: Stores, replica: Replica, incarnation: int) -> None:
        self.config = config
        self.node_id: NodeId = stores.identity.node_id
        self.cluster_id: int = stores.identity.cluster_id
        self.replica = replica
        self.stores = stores
        self.machine: StateMachine = stores.machine
        self.on_applied: Callable[[], None] = lambda: None
        self._raft = replica.raft
        self._loop = asyncio.get_running_loop()
        self._tasks: asyncio.TaskGroup | None = None
        self._own_tasks: set[asyncio.Task[None]] = set()
        self.log = structlog.get_logger().bind(node=config.name)
        self._disk = Disk(stores.log, self._loop, self._on_persisted, stores.die)
        self.peers = Peers(self.node_id, self.cluster_id, incarnation, self)
        self.evidence = Evidence(self)
        self._compaction = Compaction(self)
        self._sender = SnapshotSender(self)
        self.callers = Callers(replica, lambda: self._raft.leader, config.request_timeout_s)
        self._leasing = Leasing(LeasePort(self), time.monotonic, incarnation, is_done)
        self._ticker = Ticker(self._loop, config.tick_ms / 1000, self._tick)
        self._rounds = 0
        self._turn_due = False
        self._unapplied: list[Apply] = []  # committed, in order
        self._unapplied_bytes = 0
        self._writes_under_way = 0  # the number of the last write handed over, 0 once it is done
        self.stopping = False
        self._closed = False
        self._received: dict[int, str] = {}  # index of a received snapshot -> its state directory
        self._installing: dict[int, SnapshotMeta] = {}  # number of the write -> what it installs
        self._leader_seen: NodeId = 0

    # For services.

    @property
    def leader(self) -> NodeId:
        """The member that leads, as far as this node knows; 0 when it knows none."""
        return self._raft.leader

    @property
    def term(self) -> int:
        """This node's term."""
        return self._raft.term

    async def propose(self, kind: CommandKind, payload: bytes, deadline: float | None) -> Result:
        """Have one command committed and applied here; the result is the state machine's.

        Args:
            kind: what `payload` is.
            payload: the bytes of the request as received; already checked against the limits.
            deadline: `loop.time()` until which the caller waits; None for `request_timeout_s` from now.
        Raises:
            RequestTimeout: `.executed` says whether it is certain that nothing was done.
            OutcomeHidden: a snapshot overtook this node; the command may have been applied.
            Stopping: the node is stopping; nothing was done.
        """
        future = self.submit(kind, payload, deadline)
        try:
            return await future
        except asyncio.CancelledError:
            self.abandon(future)
            raise

    def submit(self, kind: CommandKind, payload: bytes, deadline: float | None) -> asyncio.Future[Result]:
        """As `propose`, as a future.

        Raises:
            Stopping: at once; what else `propose` raises, the future does. Who no longer waits says so by `abandon`.
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        self.submit_for(future, kind, payload, deadline)
        return future

    def submit_for(self, waiter: Waiter, kind: CommandKind, payload: bytes, deadline: float | None) -> None:
        """As `submit`, for callers that have many under way: neither task nor future, they are told in the turn."""
        if self.stopping and self.leader in (0, self.node_id):
            raise Stopping
        self.callers.submit_for(waiter, kind, payload, deadline)
        if not self._turn_due:
            self._wake()

    async def read_barrier(self, deadline: float | None) -> None:
        """Wait until this node has applied all that was committed when the call came (ReadIndex, Ongaro 6.4).

        Raises:
            RequestTimeout: no quorum confirmed a read index in time.
        """
        future = self.submit_read(deadline)
        try:
            await future
        except asyncio.CancelledError:
            self.abandon(future)
            raise

    def submit_read(self, deadline: float | None) -> asyncio.Future[object]:
        """As `read_barrier`, as a future."""
        future = self.callers.read(deadline)
        self._wake()
        return future

    def expect_news(self, expected: bool) -> None:
        """Whether somebody here waits to hear what is committed; the leader knows with the next beat."""
        self._raft.eager = expected

    def mark(self) -> Mark:
        """What this node has proposed so far, as the leader of its term; for `is_after`."""
        return Mark(self._raft.term if self._raft.role is Role.LEADER else 0, self._raft.log.last)

    def is_after(self, mark: Mark) -> bool:
        """Whether the state as applied here is certainly of a time after `mark` was taken: see `contract.Mark`."""
        return 0 < mark.term == self.machine.applied_term and self.machine.applied_index > mark.last

    def ask_lease(self, lease: int, *, renew: bool, deadline: float | None) -> asyncio.Future[LeaseLeft]:
        """Have the leader renew a lease, or say how long it has; it answers only when it has proved that it leads.

        Raises:
            RequestTimeout: the future, when no leader answered in time; whether it was renewed is not known then.
        """
        future = self.callers.wait(deadline)
        self._leasing.ask(lease, future, renew=renew)
        self._wake()
        return future  # type: ignore[return-value]  # a Future is not covariant

    def abandon(self, waiter: Waiter) -> None:
        """Nobody waits for what `submit`, `submit_read` or `ask_lease` gave any more, or this waiter does not."""
        self.callers.abandon(waiter)

    async def transfer_leadership(self, target: NodeId, deadline: float | None) -> None:
        """Hand leadership to `target` and wait until it leads.

        Raises:
            raftkv.raft.errors.NotLeader, InvalidTransferee: as consensus refuses it.
            TransferTimeout: it did not happen in time.
        """
        self._raft.transfer_leadership(target)
        self._wake()
        limit = self.callers.limit(deadline)
        while self._raft.leader != target:
            await asyncio.sleep(self.config.tick_ms / 1000)
            aborted = self._raft.role is Role.LEADER and self._raft.status().lead_transferee == 0
            if aborted or self._loop.time() > limit:
                raise TransferTimeout

    @property
    def health(self) -> frozenset[str]:
        """Why this node does not serve; empty while it does."""
        return self.evidence.reasons

    def status(self) -> NodeStatus:
        """One look at this node."""
        status = self._raft.status()
        size = self.state_bytes()
        return NodeStatus(
            term=status.term,
            leader=status.leader,
            commit=status.commit,
            applied=self.machine.applied_index,
            last_index=status.last,
            is_learner=not status.conf.is_voter(self.node_id),
            state_bytes=size,
            state_bytes_in_use=size,
        )

    def members(self) -> Sequence[MemberFacts]:
        """Everybody in the configuration, in the order of their ids."""
        conf = self._raft.conf
        published = self.machine.members
        facts = []
        for member, address in sorted(self.stores.peer_addresses(conf).items()):
            known = published.get(member)
            facts.append(
                MemberFacts(
                    member_id=member,
                    name=known.name if known else "",
                    peer_urls=(f"http://{address}",),
                    client_urls=tuple(known.client_urls) if known else (),
                    is_learner=not conf.is_voter(member),
                )
            )
        return facts

    def state_bytes(self) -> int:
        """The size of the state on disk."""
        return self.stores.state.size_bytes()

    async def defragment(self) -> None:
        """Rewrite the state's tables without what was deleted, in a thread."""
        await asyncio.to_thread(self.stores.state.compact)

    async def spool_snapshot(self) -> SpooledSnapshot:
        """A copy of the state as of now."""
        return await self._sender.backup()

    def fatal(self, fault: BaseException) -> None:
        """End the process: the disk or the state cannot be trusted (rule Z1)."""
        self.stores.die(fault)

    # Life.

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin: the disk, the links to the peers, time."""
        self._tasks = tasks
        self._disk.start()
        self.peers.update(self.spawn, self.stores.peer_addresses(self._raft.conf))
        self._ticker.start()
        self._wake()

    async def drain(self) -> None:
        """Prepare to stop: say so, hand leadership over if we have it (the best of the others takes it)."""
        self.stopping = True
        self._update_health()
        status = self._raft.status()
        if self._raft.role is not Role.LEADER or len(status.conf.voters) == 1:
            return
        best = max(
            (peer for peer in status.conf.voters if peer != self.node_id),
            key=lambda peer: (status.progress[peer].active, status.progress[peer].match),
        )
        try:
            await self.transfer_leadership(best, self._loop.time() + self.config.election_ms / 1000)
        except (TransferTimeout, RaftRefused) as fault:
            self.log.warning("transfer_failed", target=f"{best:x}", reason=str(fault))

    def close(self) -> None:
        """End the disk thread and close the stores; nobody may call anything afterwards."""
        self._closed = True
        self._disk.close()
        self.stores.close()

    def write_log(self, call: Callable[[], None]) -> asyncio.Future[None]:
        """Run something that writes the log, between two writes of the disk thread."""
        return self._disk.run(call)

    def end_tasks(self) -> None:
        """End everything that `start` and `spawn` began."""
        self.stopping = True
        self._ticker.stop()
        for task in self._own_tasks:
            task.cancel()

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run something beside the loop, for as long as the node lives."""
        assert self._tasks is not None, "not started"
        task = self._tasks.create_task(coroutine, name=name)
        self._own_tasks.add(task)
        task.add_done_callback(self._own_tasks.discard)
        return task

    # From the transport.

    def on_messages(self, sender: NodeId, messages: list[PeerMessage]) -> None:
        """Messages of one peer."""
        receive = self.replica.receive
        for message in messages:
            if isinstance(message, LeaseAsk):
                self._leasing.on_ask(sender, message)
            elif isinstance(message, LeaseAnswer):
                self._leasing.on_answer(message)
            else:
                receive(sender, message)
        self._wake()

    def on_connected(self, peer: NodeId) -> None:
        """Our stream to a peer is new."""
        self.log.info("peer_connected", peer=f"{peer:x}")
        self.replica.connected(peer)
        self._leasing.connected(peer)
        self._wake()

    def on_broken(self, peer: NodeId) -> None:
        """A stream to or from a peer broke: a sign, not yet proof."""
        self.replica.disconnected(peer)
        if peer == self._raft.leader:
            self.evidence.suspect(peer)
        self._wake()

    def on_gone(self, peer: NodeId) -> None:
        """There is proof that the process of a peer is gone."""
        self.replica.gone(peer)
        self._turn()

    def on_snapshot(self, sender: NodeId, term: int, meta: SnapshotMeta, state_name: str) -> None:
        """All of a snapshot is verified and on our disk, in the directory `state_name`."""
        self._received[meta.index] = state_name
        self.replica.receive(sender, InstallSnapshot(term, meta))
        if self._raft.log.first != meta.index + 1:  # the log has as much, or the sender lost a race with another
            unused = self.stores.directory / self._received.pop(meta.index)
            self.spawn(asyncio.to_thread(shutil.rmtree, unused, ignore_errors=True), name="snapshot-unused")
        self._wake()

    def on_snapshot_sent(self, peer: NodeId, index: int, ok: bool) -> None:
        """A transfer to a peer has ended."""
        self._raft.snapshot_sent(peer, index, ok)
        self._wake()

    # The turn.

    def _wake(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_due = False
        if self._closed:
            return  # what the disk thread had still reported
        try:
            self._obey()
        except Exception as fault:  # noqa: BLE001 - half a turn is done; going on would be a lie to peers and callers
            self.fatal(fault)

    def _obey(self) -> None:
        while True:
            self._leasing.turn()
            while (effects := self.replica.take()) is not None:
                self._carry_out(effects)
            self.peers.flush()  # also what the leases had to say
            # Where nobody waits for it here, a leader may wait for the write: the disk's thread is not to fight for the
            # interpreter. `_on_persisted` comes back to it.
            if not self._unapplied or (self._writes_under_way and self.callers.idle):
                return
            self._apply_all()

    def _carry_out(self, effects: Effects) -> None:
        persist = effects.persist
        if persist is not None and not self._disk.takes(persist):
            self._persist(persist)
            persist = None
        send = self.peers.send
        for peer, message in effects.send:
            send(peer, message)
        self.peers.flush()
        if persist is not None:  # behind what is sent: the others write at the same time
            self._disk.write(persist)
            self.replica.persisted(persist.number)
        for apply in effects.apply:
            self._unapplied.append(apply)
            self._unapplied_bytes += len(apply.entry.data)
        if self._unapplied_bytes > UNAPPLIED_BYTES_MAX:
            self._apply_all()
        elif self.replica.has_answers:
            self.callers.answer(self.replica.applied((), ()))
        for peer, index in effects.send_snapshots:
            self._sender.start(peer, index)
        for event in effects.events:
            self._on_event(event)

    def _persist(self, persist: Persist) -> None:
        self._writes_under_way = persist.number
        if persist.install is None:
            self._disk.persist(persist)
            return
        self._apply_all()  # it is the state before the snapshot that they belong to
        self._installing[persist.number] = persist.install
        self._disk.install(persist, self._received.pop(persist.install.index))

    def _on_persisted(self, number: int) -> None:
        if number >= self._writes_under_way:
            self._writes_under_way = 0
        for installed in [n for n in self._installing if n <= number]:
            self._installed(self._installing.pop(installed))
        self.replica.persisted(number)
        self._turn()  # at once, not in the next round of the loop: acknowledgements wait for this

    def _installed(self, meta: SnapshotMeta) -> None:
        """The log begins behind the received snapshot now; its state becomes ours."""
        try:
            self.machine = self.stores.switch_state()
        except (StoreUnusable, StoreDamaged) as fault:
            self.fatal(fault)
        self.replica.installed(meta)
        self.on_applied()
        self._compaction.installed(meta.index)
        self.peers.update(self.spawn, self.stores.peer_addresses(meta.conf))
        self.log.info("snapshot_installed", index=meta.index, term=meta.term)

    def _apply_all(self) -> None:
        applies, self._unapplied, self._unapplied_bytes = self._unapplied, [], 0
        if applies:
            results = self._apply(applies)
            self._leasing.applied()
            self.callers.answer(self.replica.applied(applies, results))
            self.on_applied()

    def _apply(self, applies: Sequence[Apply]) -> Sequence[Sequence[Sequence[Result]]]:
        """Apply committed entries in one write of the state."""
        conf = None
        for apply in applies:
            if apply.entry.kind is EntryKind.CONF_CHANGE:
                conf = self._raft.apply_conf_change(apply.entry)
        results = self.stores.apply(applies, conf)
        if conf is not None:
            self.peers.update(self.spawn, self.stores.peer_addresses(conf))
        self._compaction.applied(applies)
        return results

    # Time.

    def _tick(self, ticks: int) -> None:
        try:
            for _ in range(ticks):
                self.replica.tick()
                self._leasing.tick()
            self._rounds += 1
            if self.machine.sweeping or self.stores.state.learning:
                self._tidy()
            if self._rounds % EXPIRE_ROUNDS == 0:
                self.callers.expire()
                self._apply_all()  # watchers need not wait for a disk that is slow
            if self._rounds % HEALTH_ROUNDS == 0:
                self._leasing.work()
                self._update_health()
        except Exception as fault:  # noqa: BLE001 - as in `_turn`
            self.fatal(fault)
        self._turn()

    def _tidy(self) -> None:
        end = self._loop.time() + self.config.tick_ms / 1000 * TIDY_SHARE
        try:
            while self.machine.sweep(SWEEP_CHANGES) and self._loop.time() < end:
                pass
            while self.stores.state.learn(LEARN_KEYS) and self._loop.time() < end:
                pass
        except Exception as fault:  # noqa: BLE001 - the state could not be written, or read
            self.fatal(fault)

    # Events.

    def _update_health(self) -> None:
        lag = self._raft.commit - self.machine.applied_index
        restoring = bool(self._installing) or lag > self.config.apply_lag_max
        self.evidence.update(self._disk.busy_since, restoring=restoring)

    def _on_event(self, event: Event) -> None:
        fields: dict[str, object] = {"term": event.term}
        if event.leader:
            fields["leader"] = f"{event.leader:x}"
        if event.by:
            fields["peer"] = f"{event.by:x}"
        if event.detail:
            fields["detail"] = event.detail
        self.log.info(event.kind, **fields)
        if event.kind == "leader_doubted":
            self.evidence.suspect(self._raft.leader)
        if self._raft.leader != self._leader_seen:
            self._leader_seen = self._raft.leader
            self._update_health()
