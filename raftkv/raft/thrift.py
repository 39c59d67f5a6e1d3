"""Who is asked first: a lone entry, or a lone read, goes to as many voters as make a majority, to the others later.

Each follower that gets an entry pays with a message, a synced write and an apply, and a leader waits for half of them
only. So a leader that is not busy asks the *quick*, those that acknowledged first the last time; the others get what
they miss with the next tick, in one message. Everybody is asked if the quick have not answered by the tick after it.

    lone entry --> the quick --acknowledged--> committed
                      | not within two ticks
                      v
                  everybody; who acknowledges first is quick from then on

This is about when messages leave and nothing else: a leader may send whenever it likes (Ongaro 3.5), and commits what
a majority has. Never left out: who asked (its caller waits until it has applied), who is eager (somebody there
watches), and the target of a transfer. Nobody is where entries are large or follow on one another, at the first entry
of a term, and while membership changes.

See: "thrifty" operation in Moraru et al., There Is More Consensus in Egalitarian Parliaments, 2013; docs/divergence.md.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from raftkv.raft import quorum
from raftkv.raft.progress import ProgressState
from raftkv.raft.types import Index, NodeId

if TYPE_CHECKING:
    from raftkv.raft.core import Raft


class Thrift:
    """A leader's; see the module."""

    __slots__ = (
        "_commit",
        "_everybody",
        "_quick",
        "_raft",
        "_spared_entries",
        "_spared_round",
        "_waited",
        "_wanted",
        "sent_to_all",
    )

    def __init__(self, raft: Raft) -> None:
        self._raft = raft
        self._quick: tuple[NodeId, ...] = ()  # with us a majority; empty: not known
        self._wanted: set[NodeId] = set()  # not to be left out of the next flush
        self._everybody = True  # the next flush leaves nobody out
        self._spared_entries = self._spared_round = False  # somebody was left out since the last tick
        self.sent_to_all: Index = 0
        """Everybody was sent what is up to here, as far as windows allowed. Who lacks any of it is catching up: it is
        never left out, because the next append follows each acknowledgement."""
        self._waited = False  # a tick has passed since, with an entry under way
        self._commit = 0  # as of the last tick

    @property
    def quick(self) -> tuple[NodeId, ...]:
        """Those that are asked first; empty while everybody is."""
        return self._quick

    def reset(self) -> None:
        """A term of leadership begins: nobody is known to be quick."""
        self._quick = ()
        self._wanted.clear()
        self._everybody = True
        self._spared_entries = self._spared_round = self._waited = False
        self._commit = 0
        self.sent_to_all = 0

    def want(self, peer: NodeId) -> None:
        """Somebody at `peer` waits for what is new in the log: do not leave it out."""
        if self._spared_entries or self._quick:
            self._wanted.add(peer)
            self._raft.dirty = True

    def want_everybody(self) -> None:
        """Leave nobody out of the next flush."""
        self._everybody = True
        self._raft.dirty = True

    def for_entries(self) -> Collection[NodeId] | None:
        """Who gets entries now; None for everybody."""
        raft = self._raft
        everybody, self._everybody = self._everybody, False
        wanted = self._wanted
        if wanted:
            self._wanted = set()
        if not everybody and self._is_lone() and self._usable():
            self._spared_entries = True
            eager = [peer for peer, progress in raft.progress.items() if progress.eager]
            return wanted.union(self._quick, eager) if wanted or eager else self._quick
        self.sent_to_all = raft.log.last
        return None

    def _is_lone(self) -> bool:
        """Whether one small entry is under way, or none."""
        raft = self._raft
        return (
            raft.log.last - raft.log.commit <= 1
            and raft.uncommitted_bytes <= raft.config.lone_bytes_max
            and not raft.lead_transferee
        )

    def for_round(self) -> Collection[NodeId] | None:
        """Who is asked to confirm that we lead, for reads; None for everybody."""
        if not self._usable():
            return None
        self._spared_round = True
        return self._quick

    def _usable(self) -> bool:
        """Whether the quick have kept up, and are a majority with us."""
        raft = self._raft
        if not self._quick or raft.conf.outgoing:
            return False
        commit, voters = raft.log.commit, raft.conf.voters
        if len(self._quick) + 1 != quorum.quorum_size(len(voters)) or raft.node_id not in voters:
            return False
        for peer in self._quick:
            progress = raft.progress.get(peer)
            if (
                progress is None
                or peer not in voters
                or progress.match < commit
                or progress.state is not ProgressState.REPLICATE
                or progress.paused
            ):
                return False
        return True

    def committed(self) -> None:
        """The commit index rose: where nobody is known to be quick, those are that made it so."""
        raft = self._raft
        if self._quick or not raft.config.lone_bytes_max:
            return
        progress, commit = raft.progress, raft.log.commit
        needed = quorum.quorum_size(len(raft.conf.voters)) - 1
        have = [peer for peer in raft.conf.voters if peer in progress and progress[peer].match >= commit]
        if len(have) >= needed:
            self._quick = tuple(have[:needed])

    def tick(self) -> None:
        """Time passes for the leader: who was left out gets its share, who is slow is not quick any more."""
        raft = self._raft
        if self._spared_entries:
            # What left just before this tick is given the next one, or every other entry would go to everybody.
            if raft.log.last > raft.log.commit and not self._waited:
                self._waited = True
            else:
                self._spared_entries = self._waited = False
                self.want_everybody()
        if self._spared_round:
            self._spared_round = False
            if raft.reads.in_rounds:
                raft.beat_due = True
        progress = raft.progress
        if self._quick and (
            len(self._quick) + 1 != quorum.quorum_size(len(raft.conf.voters))  # others are members now
            or any(peer not in progress or progress[peer].match < self._commit for peer in self._quick)
        ):
            self._quick = ()
        # Without the ones that are gone nothing is committed, so to be behind the commit index would never show them:
        # an entry that was under way for a whole tick counts as well.
        self._commit = raft.log.last if self._waited else raft.log.commit
