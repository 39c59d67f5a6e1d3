"""How one node takes part in consensus."""

from __future__ import annotations

from dataclasses import dataclass, fields

from raftkv.raft.errors import ConfigError

_MAY_BE_ZERO = ("evidence_random_ticks", "evidence_rank_ticks", "cache_bytes_max", "lone_bytes_max")


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftConfig:
    """Times are ticks; the driver decides how long a tick is (10 ms in `raftkv node`)."""

    heartbeat_ticks: int = 5
    """How often a leader shows that it lives. A tenth of `election_ticks` or so: one lost beat costs nothing."""

    election_ticks: int = 40
    """Silence before a campaign, drawn anew from [n, 2n) so that two rarely start at once (Ongaro 3.4). Also how
    long a voter sticks to a leader it heard, a leader keeps its office without a quorum, and a transfer may take."""

    pre_vote: bool = True
    """Ask before raising the term, so that a node which was cut off disturbs nobody on its return (Ongaro 9.6)."""

    check_quorum: bool = True
    """A leader that hears no quorum for `election_ticks` steps down, and voters that hear a leader ignore
    candidates (Ongaro 6.2, 4.2.3)."""

    evidence_rank_ticks: int = 1
    """After evidence that the leader's process is gone, voters campaign one after the other, this far apart: about
    as long as one election takes on a local network."""

    evidence_random_ticks: int = 1
    """At most this much is added to the delay after evidence, drawn at random."""

    evidence_retry_ticks: int = 3
    """A pre-candidate asks again this often: other voters may find a little later that the leader is dead."""

    candidate_ticks: int = 8
    """An election that has come to nothing after this, drawn from [n, 2n) and doubled with each attempt up to
    `election_ticks`, starts anew: with split votes there is nobody to wait for."""

    append_bytes_max: int = 1 << 20
    """Entries in one append; one entry may exceed it. 1 MiB as in etcd: long enough to be efficient, short enough
    not to hold up heartbeats behind it."""

    inflight_appends_max: int = 256
    """Appends on their way to one follower."""

    inflight_bytes_max: int = 16 << 20
    """Bytes of entries on their way to one follower; one append may exceed it."""

    uncommitted_bytes_max: int = 64 << 20
    """Proposals are refused while this much waits to be committed; one proposal may exceed it."""

    committed_bytes_max: int = 4 << 20
    """Committed entries handed out in one Ready, so that applying a long backlog never blocks a turn for long."""

    lone_bytes_max: int = 0
    """An entry up to this size, with nothing else under way, is sent to as many voters as make a majority with the
    leader, and to the others with the next tick; see `thrift`. 0 sends everything to everybody at once."""

    cache_bytes_max: int = 8 << 20
    """Recent entries kept in memory, so that followers which keep up never cost a read from disk."""

    disk_stall_ticks: int = 40
    """A leader whose own disk finishes nothing for so long, though something is outstanding, steps down: an election
    timeout, as for any other failure."""

    read_rounds_max: int = 4
    """Rounds of heartbeats under way for reads; further reads share the next one."""

    read_retry_ticks: int = 10
    """A follower asks the leader again when reads it forwarded were not answered for so long."""

    reads_max: int = 4096
    """Forwarded rounds of reads that wait on a leader; more are dropped, and asked again by their senders."""

    strict_conf_change: bool = True
    """Refuse a change after which the voters that answer now are no majority: start it as a learner first."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if not isinstance(value, bool) and value < least:
                raise ConfigError(field.name, f"{value} must be at least {least}")
        if self.election_ticks <= self.heartbeat_ticks:
            raise ConfigError("election_ticks", f"{self.election_ticks} must exceed heartbeat_ticks")
