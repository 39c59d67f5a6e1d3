"""What one node has on its disk, opened together: the log, the current state, and who this node is.

    DIR/log/            the Raft log, written with sync by the disk thread
    DIR/state-<n>/      the state machine, written without sync by the loop; the log names the current one
    DIR/snapshots/      spooled snapshots for followers      DIR/incoming/   half received ones

The state may lag behind the log after a crash (it is replayed) and is never ahead of it: entries are applied only
when they are durable in the log.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from raftkv._pb import raft_pb2
from raftkv.raft.types import ConfState, NodeId
from raftkv.replica.effects import Apply
from raftkv.server.config import NodeConfig, cluster_id, member_id
from raftkv.server.convert import conf_from_wire, conf_to_wire
from raftkv.state.keys import CURRENT
from raftkv.state.machine import StateMachine
from raftkv.state.results import Result
from raftkv.storage.data_dir import remove_leftovers
from raftkv.storage.errors import DAMAGED_WAY_OUT, NodeFatal, StoreDamaged
from raftkv.storage.keys import Identity
from raftkv.storage.log_store import LogStore
from raftkv.storage.state_store import StateStore

EXIT_FATAL = 70
"""EX_SOFTWARE: the node must not go on, and restarting it as it is may not help."""


class Stores:
    """The open stores of one node; see the module."""

    def __init__(self, config: NodeConfig) -> None:
        """Open, or create on the first start.

        Raises:
            StoreDamaged, StoreForeign, StoreLocked: with the file, the fault and the way out.
        """
        self._config = config
        self.directory: Path = config.data_dir
        cluster = cluster_id(config.initial_cluster, config.initial_cluster_token)
        self._members: dict[NodeId, tuple[str, str]] = {
            member_id(name, address, config.initial_cluster_token): (name, address)
            for name, address in config.initial_cluster.items()
        }
        node = member_id(config.name, config.initial_cluster[config.name], config.initial_cluster_token)
        self.identity = Identity(cluster_id=cluster, node_id=node, name=config.name)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = LogStore.open(self.directory / "log", self.identity, create=True)
        if self.log.last_index() == 0 and not self.log.snapshot().conf.voters:
            self.log.bootstrap(ConfState(voters=tuple(sorted(self._members))))
        remove_leftovers(self.directory, self.log.state_name)
        self.state = self._open_state(create=True)
        self._retired: list[StateStore] = []
        self.machine = StateMachine(self.state)
        self._check_state()

    def _open_state(self, *, create: bool) -> StateStore:
        return StateStore.open(self.directory / self.log.state_name, create=create, filtered=CURRENT)

    def _check_state(self) -> None:
        """A state the log cannot have led to, or cannot lead on from, is not ours: lost, or put back from a copy."""
        applied, first, last = self.machine.applied_index, self.log.first_index(), self.log.last_index()
        if not first - 1 <= applied <= last:
            raise StoreDamaged(
                self.state.path,
                f"the state is as of log index {applied}, the log has {first} to {last}",
                DAMAGED_WAY_OUT,
            )

    @property
    def repaired(self) -> list[str]:
        """What opening has put right after a kill or a power loss, for the log."""
        return [text for text in (self.log.repaired, self.state.repaired) if text]

    def check_membership(self, conf: ConfState) -> None:
        """Hold the membership that consensus found in the log against the one in the state, as of the same index.

        Raises:
            StoreDamaged: they differ.
        """
        if self.machine.conf and conf_from_wire(raft_pb2.ConfState.FromString(self.machine.conf)) != conf:
            raise StoreDamaged(self.state.path, "the state has another membership than the log", DAMAGED_WAY_OUT)

    def peer_addresses(self, conf: ConfState) -> Mapping[NodeId, str]:
        """Where the members of `conf` listen for peers."""
        known = {node: address for node, (_, address) in self._members.items()}
        for node, member in self.machine.members.items():
            if member.peer_urls:
                known[node] = member.peer_urls[0].removeprefix("http://")
        return {node: known[node] for node in conf.members() if node in known}

    def members(self) -> Mapping[NodeId, tuple[str, str]]:
        """Id to (name, peer address) of the initial cluster."""
        return self._members

    def apply(self, applies: Sequence[Apply], conf: ConfState | None) -> Sequence[Sequence[Sequence[Result]]]:
        """Apply entries in one write; `conf` is the configuration after them when it changed."""
        return self.machine.apply_many(
            [(apply.entry.index, apply.entry.term, apply.groups) for apply in applies],
            None if conf is None else conf_to_wire(conf).SerializeToString(deterministic=True),
        )

    def switch_state(self) -> StateMachine:
        """Turn to the state that the log now names (a snapshot was installed)."""
        # The old one stays open until the process ends: a thread may still read a view of it, and closing LevelDB
        # under a reader is a crash. Installing a snapshot is rare, and the next start removes the directory.
        self._retired.append(self.state)
        self.state = self._open_state(create=False)
        self.machine = StateMachine(self.state)
        return self.machine

    def close(self) -> None:
        """Close the states; the log is closed by its disk thread's owner."""
        for state in (*self._retired, self.state):
            state.close()

    @staticmethod
    def die(fault: BaseException) -> None:
        """End the process at once, with one line that says why (rule Z1). Callable from any thread."""
        kind = "storage failed" if isinstance(fault, NodeFatal) else "unexpected error"
        text = " ".join(str(fault).split())
        os.write(sys.stderr.fileno(), f"raftkv: fatal: {kind}: {type(fault).__name__}: {text}\n".encode())
        os._exit(EXIT_FATAL)
