"""How the log gets to the followers, and when it counts as committed.

Appends are made when a Ready is taken, so everything proposed in one turn travels in one message, and all
followers that stand at the same index get the same message object.

See: Ongaro 3.5, 3.6, 10.2.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from raftkv.raft import membership, quorum, transfer
from raftkv.raft.log import entry_bytes
from raftkv.raft.messages import Append, AppendReply, Heartbeat, HeartbeatReply, InstallSnapshot
from raftkv.raft.progress import Progress, ProgressState
from raftkv.raft.types import Entry, Index, NodeId, Role

if TYPE_CHECKING:
    from raftkv.raft.core import Raft

# Made in this flush: (next, bytes that may be sent) -> the append, its bytes. Followers in step share one.
_Shared = dict[tuple[Index, int], tuple[Append, int]]


# The leader's side.


def flush(raft: Raft) -> None:
    """Send each follower what it has not got, as far as its window allows; see `thrift` for who is left out."""
    raft.dirty = False
    shared: _Shared = {}
    log = raft.log
    chosen = raft.thrift.for_entries()
    for peer, progress in raft.progress.items():
        if chosen is not None and peer not in chosen and progress.next > raft.thrift.sent_to_all:
            continue
        while progress.next <= log.last and not progress.paused:
            recent = log.in_memory(progress.next)
            if not send_append(raft, peer, progress, shared=shared) or not recent:
                # Old entries are read from disk: one append at a time, the next when this one is acknowledged, so
                # that a follower far behind never holds up a turn.
                break


def send_append(
    raft: Raft, peer: NodeId, progress: Progress, *, even_empty: bool = False, shared: _Shared | None = None
) -> bool:
    """Send one append, or ask for a snapshot when it needs what is compacted; whether anything was sent."""
    if progress.paused or progress.state is ProgressState.SNAPSHOT:
        return False
    log, config, inflights = raft.log, raft.config, progress.inflights
    assert progress.match < progress.next <= log.last + 1  # R15
    if inflights.full:
        room = 0
    else:
        room = min(config.append_bytes_max, config.inflight_bytes_max - inflights.bytes)
    append, size = shared.get((progress.next, room), (None, 0)) if shared is not None else (None, 0)
    if append is None:
        prev = progress.next - 1
        prev_term = log.term(prev)
        entries: tuple[Entry, ...] | None = log.slice(progress.next, log.last + 1, room) if room else ()
        if prev_term is None or entries is None:
            return _send_snapshot(raft, peer, progress)
        if not entries and not even_empty:
            return False
        size = sum(map(entry_bytes, entries))
        append = Append(raft.term, prev, prev_term, entries, log.commit)
        if shared is not None:
            shared[progress.next, room] = (append, size)
    last = append.prev_index + len(append.entries)
    progress.sent(last, size)
    if progress.state is ProgressState.REPLICATE:
        progress.commit_sent = max(progress.commit_sent, min(append.commit, last))
    raft.send(peer, append)
    return True


def _send_snapshot(raft: Raft, peer: NodeId, progress: Progress) -> bool:
    if raft.now - progress.active_tick >= raft.config.election_ticks:
        return False  # nobody is there to take it
    index = raft.log.first - 1
    progress.become_snapshot(index)
    raft.out.send_snapshots.append((peer, index))
    raft.event("snapshot_needed", by=peer)
    return True


def beat(raft: Raft, *, to_learners: bool) -> None:
    """One round of heartbeats, with a fresh token; waiting reads join it.

    Args:
        to_learners: it is for everybody, to show that we live; else for reads alone, and for as many as that takes.
    """
    raft.token += 1
    chosen = None if to_learners else raft.thrift.for_round()
    for peer, progress in raft.progress.items():
        if chosen is not None and peer not in chosen:
            continue
        if to_learners or raft.conf.is_voter(peer):
            # Never beyond what it acknowledged: only of that do we know that it is the same there (R9).
            commit = min(progress.match, raft.log.commit)
            progress.commit_sent = max(progress.commit_sent, commit)
            raft.send(peer, Heartbeat(raft.term, commit, raft.token))
    raft.reads.begin_round(raft.token)


def notify_commit(raft: Raft, peers: Iterable[NodeId]) -> None:
    """Tell `peers` how far the log is committed, if it is news to them.

    One that lags hears it as soon as it has the entry.
    """
    for peer in peers:
        progress = raft.progress.get(peer)
        if progress is not None:
            progress.notice_due = raft.log.commit
            _send_notice(raft, peer, progress)


def _send_notice(raft: Raft, peer: NodeId, progress: Progress) -> None:
    commit = min(progress.match, raft.log.commit)
    if commit >= progress.notice_due:
        progress.notice_due = 0
    if commit > progress.commit_sent:
        progress.commit_sent = commit
        raft.send(peer, Heartbeat(raft.term, commit, 0))


def maybe_commit(raft: Raft) -> bool:
    """Raise the commit index to what a majority has durably; whether it rose."""
    log = raft.log
    matches = {peer: progress.match for peer, progress in raft.progress.items()}
    matches[raft.node_id] = log.stable  # not before its own disk is done
    index = quorum.agreed_value(raft.conf, matches)
    # A majority storing the entry is not enough: one of an earlier term can still be
    # overwritten by a later leader (Ongaro 3.6.2). Counting commits only our own term's
    # entries, and those carry the earlier ones along.
    if index <= log.commit or index < raft.term_start:
        return False
    assert log.term(index) == raft.term, f"commit {index} of term {log.term(index)} in term {raft.term}"  # R8
    log.commit_to(index)
    raft.thrift.committed()
    uncommitted = raft.uncommitted
    while uncommitted and uncommitted[0][0] <= index:
        raft.uncommitted_bytes -= uncommitted.popleft()[1]
    return True


def on_append_reply(raft: Raft, sender: NodeId, message: AppendReply) -> None:
    """A follower has taken or refused an append."""
    progress = raft.progress.get(sender)
    if raft.role is not Role.LEADER or progress is None:
        return
    log = raft.log
    progress.active_tick = raft.now
    if message.rejected:
        meet = message.hint_index
        if message.hint_term > 0:
            # Skip what it cannot have: all our entries there with terms above its own (fast backtracking).
            meet, _ = log.last_not_after(meet, message.hint_term)
        if progress.rejected(message.index, meet):
            send_append(raft, sender, progress, even_empty=True)
        return
    if not 0 <= message.index <= log.last:
        raft.ignored(sender, f"acknowledges {message.index}, the log ends at {log.last}")
        return
    news = progress.accepted(message.index)
    if news or (progress.match == message.index and progress.state is ProgressState.PROBE):
        progress.acked = True
        if progress.state is ProgressState.PROBE or (
            progress.state is ProgressState.SNAPSHOT and progress.match + 1 >= log.first
        ):
            progress.become_replicate()
        if message.index > log.commit:
            maybe_commit(raft)
        if progress.notice_due:
            _send_notice(raft, sender, progress)
        if progress.next <= log.last:
            raft.dirty = True
        if sender == raft.lead_transferee:
            transfer.remind(raft)


def on_heartbeat_reply(raft: Raft, sender: NodeId, message: HeartbeatReply) -> None:
    """A follower still follows."""
    progress = raft.progress.get(sender)
    if raft.role is not Role.LEADER or progress is None:
        return
    progress.active_tick = raft.now
    progress.eager = message.eager
    if progress.token < message.token <= raft.token:
        progress.token = message.token
        raft.reads.check()
    if progress.state is ProgressState.SNAPSHOT:
        return
    quiet, progress.acked = not progress.acked, False
    if progress.state is ProgressState.PROBE or (quiet and progress.match < raft.log.last):
        # The append, or its acknowledgement, may be lost: ask again.
        progress.paused = False
        send_append(raft, sender, progress, even_empty=True)


def snapshot_sent(raft: Raft, peer: NodeId, index: Index, *, ok: bool) -> None:
    """A snapshot got to `peer` completely, or did not."""
    progress = raft.progress.get(peer)
    if progress is None or progress.state is not ProgressState.SNAPSHOT:
        return
    progress.pending_snapshot = min(index, raft.log.last) if ok else 0
    progress.become_probe()
    # Wait until it says that it is installed, or for the next sign of life.
    progress.paused = True


# The follower's side.


def on_append(raft: Raft, sender: NodeId, message: Append) -> None:
    """The leader sends entries, or asks whether the logs meet."""
    if not raft.heard_leader(sender):
        return
    log = raft.log
    prev = message.prev_index
    if prev < log.commit:
        # Old news. What is committed is the same everywhere, so that much can be acknowledged.
        reply_append(raft, sender, log.commit)
        return
    if not log.matches(prev, message.prev_term):
        hint, hint_term = log.last_not_after(prev, message.prev_term)
        raft.send(sender, AppendReply(raft.term, prev, True, hint, hint_term))
        return
    fault = _entries_fault(message)
    if fault:
        raft.ignored(sender, fault)
        return
    entries = message.entries
    if prev != log.last:
        start = 0
        while start < len(entries) and log.matches(entries[start].index, entries[start].term):
            start += 1
        entries = entries[start:]
        if entries and entries[0].index <= log.last:
            if entries[0].index <= log.commit:
                raft.ignored(sender, f"entry {entries[0].index} contradicts what is committed")
                return
            assert raft.role is Role.FOLLOWER  # R2: a leader never overwrites its own log
            log.truncate(entries[0].index)
            raft.verified = min(raft.verified, log.last)
    if entries:
        log.append(entries)
    last = prev + len(message.entries)
    raft.verified = max(raft.verified, last)
    if message.commit > log.commit:
        log.commit_to(min(message.commit, last))  # R9: not beyond what this append has verified
    reply_append(raft, sender, last)


def _entries_fault(message: Append) -> str:
    """What is impossible about the entries of an append; "" when nothing is."""
    index, term = message.prev_index, message.prev_term
    for entry in message.entries:
        index += 1
        if entry.index != index or not term <= entry.term <= message.term:
            return f"entry {entry.term}/{entry.index} where {index} of term {term} to {message.term} belongs"
        term = entry.term
    return ""


def reply_append(raft: Raft, leader: NodeId, index: Index) -> None:
    """Acknowledge everything up to `index`, once it is durable."""
    reply = AppendReply(raft.term, index)
    if index <= raft.log.stable:
        raft.send(leader, reply)
    else:
        raft.send_after(leader, reply)


def on_heartbeat(raft: Raft, sender: NodeId, message: Heartbeat) -> None:
    """The leader lives, and tells how far the log is committed."""
    if not raft.heard_leader(sender):
        return
    log = raft.log
    if message.commit > log.commit:
        log.commit_to(max(min(message.commit, raft.verified), log.commit))
        if message.commit > raft.verified:
            # It counts on an acknowledgement of ours from before a restart. Let it show that the logs still agree.
            hint, hint_term = log.last_not_after(min(message.commit, log.last), raft.term)
            raft.send(sender, AppendReply(raft.term, message.commit, True, hint, hint_term))
    if message.token:
        raft.send(sender, HeartbeatReply(raft.term, message.token, raft.eager))


def on_install_snapshot(raft: Raft, sender: NodeId, message: InstallSnapshot) -> None:
    """A whole, verified snapshot is on disk here.

    What it holds is committed, whoever sent it: that it took long, and its sender does not lead any more, makes it no
    less so. Therefore it shows nobody to be the leader either.
    """
    if raft.role is Role.LEADER:
        return
    if sender == raft.leader:
        raft.election_elapsed = 0
    log, meta = raft.log, message.meta
    fault = ""
    if not 0 < meta.term <= message.term or not meta.conf.voters:
        fault = f"snapshot {meta.term}/{meta.index} in term {message.term} with voters {meta.conf.voters}"
    elif raft.node_id not in meta.conf.members():
        fault = f"snapshot {meta.index} of a cluster we are not in"
    if fault:
        raft.ignored(sender, fault)
        return
    if meta.index <= log.commit:
        raft.event("snapshot_ignored", by=sender, detail=f"{meta.index} is behind commit {log.commit}")
        reply_append(raft, sender, log.commit)
        return
    if log.matches(meta.index, meta.term):
        # R10: what is here holds the same and perhaps more.
        raft.event("snapshot_ignored", by=sender, detail=f"the log holds {meta.term}/{meta.index}")
        log.commit_to(meta.index)
    else:
        if raft.role is not Role.FOLLOWER:
            raft.become_follower(raft.term, 0, "a snapshot replaces the log")
        log.restore(meta)
        # What is known of before stays: until the snapshot is installed, the state machine is there.
        raft.conf_history.add(meta.index, meta.conf)
        membership.adopt(raft, meta.conf)
        raft.event("snapshot_accepted", by=sender, detail=f"{meta.term}/{meta.index}")
    raft.verified = max(raft.verified, meta.index)
    reply_append(raft, sender, meta.index)
