"""Who leads: campaigns, votes, and what makes a node doubt its leader.

    FOLLOWER --timeout, evidence--> PRE_CANDIDATE --majority would--> CANDIDATE --majority voted--> LEADER
       ^  ^---refused, a leader is heard---+                             |                            |
       |  +-----------------------refused, a leader is heard-------------+                            |
       +------------------a later term, no quorum answers, disk stalled, removed---------------------+
    FOLLOWER --TimeoutNow from the leader--> CANDIDATE

A vote counts, one's own included, once it is durable.    See: Ongaro 3.4, 3.6.1, 3.10, 6.2, 9.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from raftkv.raft import quorum
from raftkv.raft.messages import PreVote, PreVoteReply, TimeoutNow, Vote, VoteReply
from raftkv.raft.quorum import VoteResult
from raftkv.raft.types import Index, NodeId, Role, Term

if TYPE_CHECKING:
    from raftkv.raft.core import Raft

TIMEOUT = "timeout"
EVIDENCE = "evidence"
TRANSFER = "transfer"
REQUESTED = "requested"


class Candidacy:
    """What a node remembers on its way to an election; a leader that is heard ends it."""

    __slots__ = ("attempts", "delay", "evidence", "postponed", "reason", "refused", "retry", "votes")

    def __init__(self) -> None:
        self.votes: dict[NodeId, bool] = {}  # answers to the present campaign; empty unless (pre-)candidate
        self.reason = ""  # of the present campaign
        self.attempts = 0  # elections that came to nothing since a leader was heard
        self.evidence = False  # the last leader's process is gone: campaign soon again when this one fails
        self.delay = -1  # ticks until the campaign after evidence, -1: none is planned
        self.retry = 0  # ticks until pre-votes are asked for again
        self.postponed = ""  # why to campaign as soon as pending conf changes are applied
        self.refused: dict[NodeId, tuple[int, PreVote]] = {}  # whom we ignored for our leader's sake, and when

    def clear(self) -> None:
        """There is a leader, or somebody better has our vote."""
        self.votes.clear()
        self.attempts = 0
        self.evidence = False
        self.delay = -1
        self.postponed = ""
        self.refused.clear()


def promotable(raft: Raft) -> bool:
    """Whether this node may lead."""
    return raft.conf.is_voter(raft.node_id) and raft.log.install is None


def campaign(raft: Raft, reason: str) -> None:
    """Stand for election, with a pre-vote first unless the leader itself has asked us to."""
    if raft.role is Role.LEADER or not promotable(raft) or raft.disk_stalled:
        return
    log = raft.log
    if log.has_conf_change(log.applied + 1, log.commit + 1):
        # We would count votes by a conf state that is known to be out of date.
        raft.candidacy.postponed = reason
        return
    raft.candidacy.postponed = ""
    raft.candidacy.reason = reason
    if reason == TRANSFER or not raft.config.pre_vote:
        _stand(raft)
        return
    raft.become_pre_candidate()
    raft.event("pre_campaign", detail=reason)
    raft.candidacy.retry = raft.config.evidence_retry_ticks
    raft.candidacy.votes[raft.node_id] = True
    if not _decide_pre_vote(raft):
        _ask_pre_votes(raft)


def _ask_pre_votes(raft: Raft) -> None:
    request = PreVote(raft.term + 1, raft.log.last, raft.log.last_term)
    for voter in _other_voters(raft):
        if not raft.candidacy.votes.get(voter):
            raft.send(voter, request)


def _other_voters(raft: Raft) -> list[NodeId]:
    return sorted({*raft.conf.voters, *raft.conf.outgoing} - {raft.node_id})


def _decide_pre_vote(raft: Raft) -> bool:
    result = quorum.vote_result(raft.conf, raft.candidacy.votes)
    if result is VoteResult.WON:
        _stand(raft)
        return True
    if result is VoteResult.LOST:
        give_up(raft, "pre-vote refused")
    return False


def _stand(raft: Raft) -> None:
    """Raise the term and ask for votes; the requests leave once our own vote is durable."""
    raft.become_candidate()
    # Those who said yes a moment ago may have been split between candidates: then it is not the full silence that
    # must pass until the next attempt. Twice as long each time, lest slow disks never get to answer in time.
    base = min(raft.config.candidate_ticks << min(raft.candidacy.attempts, 16), raft.config.election_ticks)
    raft.election_timeout = raft.random.randrange(base, 2 * base)
    raft.candidacy.attempts += 1
    raft.event("campaign", detail=raft.candidacy.reason)
    request = Vote(raft.term, raft.log.last, raft.log.last_term, raft.candidacy.reason == TRANSFER)
    for voter in _other_voters(raft):
        raft.send(voter, request)


def own_vote_durable(raft: Raft) -> None:
    """Our term and our vote for ourselves are on disk: from now on it counts."""
    raft.candidacy.votes[raft.node_id] = True
    _decide_vote(raft)


def _decide_vote(raft: Raft) -> None:
    result = quorum.vote_result(raft.conf, raft.candidacy.votes)
    if result is VoteResult.WON and raft.candidacy.votes.get(raft.node_id) is True:
        raft.become_leader()
    elif result is VoteResult.LOST:
        give_up(raft, "election lost")


def give_up(raft: Raft, why: str) -> None:
    """This campaign has failed."""
    raft.become_follower(raft.term, 0, why)


def plan_again(raft: Raft) -> None:
    """Campaign again soon, though not at once: there is no leader to wait for."""
    raft.candidacy.delay = raft.random.randint(1, 2 * raft.config.candidate_ticks)


def sticky(raft: Raft) -> bool:
    """Whether we hear a leader, and so help nobody to replace it (Ongaro 4.2.3)."""
    return (
        raft.config.check_quorum
        and raft.leader != 0
        and (raft.role is Role.LEADER or raft.election_elapsed < raft.config.election_ticks)
    )


def _doubted(raft: Raft, sender: NodeId) -> None:
    """`sender` does not hear our leader: the driver may want to look whether it is still there."""
    if raft.leader == raft.node_id:
        return
    seen = raft.candidacy.refused.get(sender)
    if seen is None or raft.now - seen[0] >= raft.config.heartbeat_ticks:
        raft.event("leader_doubted", by=sender)


def on_pre_vote(raft: Raft, sender: NodeId, message: PreVote) -> None:
    """Would we vote for `sender`? Changes nothing here, so any number may be told yes."""
    if raft.disk_stalled:
        return  # a vote could not become durable
    if message.term > raft.term and sticky(raft):
        _doubted(raft, sender)
        raft.candidacy.refused[sender] = (raft.now, message)
        return
    can_vote = message.term > raft.term or raft.vote == sender or (raft.vote == 0 and raft.leader == 0)
    if can_vote and raft.log.up_to_date(message.last_index, message.last_term):
        candidacy = raft.candidacy
        if candidacy.delay >= 0:
            # It is ahead of us: let its election end before ours would split the vote.
            candidacy.delay = max(candidacy.delay, raft.config.evidence_retry_ticks)
        elif raft.role is Role.PRE_CANDIDATE and _rank(raft, sender) < _rank(raft, raft.node_id):
            # Both of us would be elected now, and would split the vote: one order decides who goes first.
            raft.become_follower(raft.term, 0, f"{sender} goes first")
            plan_again(raft)
        raft.send(sender, PreVoteReply(message.term, True))
    else:
        # With our own term, so that a candidate whose term is smaller catches up and is not refused for ever
        # (etcd #8243).
        raft.send(sender, PreVoteReply(raft.term, False, *_commit_known(raft)))


def _commit_known(raft: Raft) -> tuple[Index, Term]:
    """What a refused candidate gets to know. Where the others' last voters were removed together with the leader, they
    alone may know of it: they cannot stand any more, will not vote for a shorter log, and the candidate still
    counts them in. Told that the change is committed, it needs them no longer."""
    return raft.log.commit, raft.log.term(raft.log.commit) or 0


def _learn_commit(raft: Raft, commit: Index, commit_term: Term) -> None:
    """An entry that is committed is so for everybody who holds it, whoever tells."""
    if commit_term > 0 and raft.log.commit < commit and raft.log.matches(commit, commit_term):
        raft.log.commit_to(commit)


def on_pre_vote_reply(raft: Raft, sender: NodeId, message: PreVoteReply) -> None:
    """An answer to our pre-vote."""
    if raft.role is Role.LEADER:
        return
    if not message.granted:
        _learn_commit(raft, message.commit, message.commit_term)
    if raft.role is not Role.PRE_CANDIDATE:
        return  # perhaps the refusal itself has just told us of a later term
    if message.granted and message.term != raft.term + 1:
        return  # of an earlier campaign
    raft.candidacy.votes[sender] = message.granted
    _decide_pre_vote(raft)


def on_vote(raft: Raft, sender: NodeId, message: Vote) -> None:
    """`sender` stands in our term."""
    if raft.disk_stalled:
        return
    can_vote = raft.vote == sender or (raft.vote == 0 and raft.leader == 0)
    if can_vote and raft.log.up_to_date(message.last_index, message.last_term):
        if raft.role is not Role.FOLLOWER:
            raft.become_follower(raft.term, 0, f"votes for {sender}")
        assert raft.vote in (0, sender)  # R12: one vote a term
        raft.vote = sender
        raft.election_elapsed = 0
        raft.candidacy.clear()
        raft.event("vote_granted", by=sender)
        raft.send(sender, VoteReply(raft.term, True))
    else:
        if raft.candidacy.delay >= 0:
            # A majority would elect it, if not us: let that end. The leader to be would answer to our later term, and
            # those who follow it would not help us to replace it.
            raft.candidacy.delay = max(raft.candidacy.delay, raft.config.evidence_retry_ticks)
        raft.send(sender, VoteReply(raft.term, False, *_commit_known(raft)))


def on_vote_reply(raft: Raft, sender: NodeId, message: VoteReply) -> None:
    """An answer in our election."""
    if not message.granted and raft.role is not Role.LEADER:
        _learn_commit(raft, message.commit, message.commit_term)
    if raft.role is Role.CANDIDATE:
        raft.candidacy.votes.setdefault(sender, message.granted)
        _decide_vote(raft)


def on_timeout_now(raft: Raft, sender: NodeId, message: TimeoutNow) -> None:
    """The leader hands its office to us, unless it has changed its mind since."""
    # A leader that gives up a transfer appends an entry, so a late message does not fit our log any more, or if it
    # does, the others' logs are ahead of ours (raft-rs #234).
    if raft.role is Role.FOLLOWER and sender == raft.leader and message.last_index == raft.log.last:
        campaign(raft, TRANSFER)


def leader_unreachable(raft: Raft, leader: NodeId) -> None:
    """There is proof that the leader's process is gone."""
    if leader == 0 or leader != raft.leader or raft.role is Role.LEADER:
        return
    refused = raft.candidacy.refused
    raft.candidacy.refused = {}
    raft.set_leader(0)
    raft.candidacy.evidence = True
    plan_by_rank(raft, leader)
    # Whom we refused a moment ago for the sake of that leader gets its answer now, as if its question came late.
    for sender, (tick, request) in refused.items():
        if sender != leader and raft.now - tick < raft.config.election_ticks and request.term > raft.term:
            on_pre_vote(raft, sender, request)


def plan_by_rank(raft: Raft, gone: NodeId) -> None:
    """Campaign after a delay: the living take turns, and who is first changes with the term."""
    if not promotable(raft):
        return
    config = raft.config
    rank = _rank(raft, raft.node_id, gone)
    raft.candidacy.delay = rank * config.evidence_rank_ticks + raft.random.randint(0, config.evidence_random_ticks)
    if raft.candidacy.delay == 0:
        raft.candidacy.delay = -1
        campaign(raft, EVIDENCE)


def _rank(raft: Raft, node: NodeId, gone: NodeId = 0) -> int:
    """The place of a voter among all but `gone`, in an order that all compute alike and that moves with the term."""
    voters = sorted({*raft.conf.voters, *raft.conf.outgoing} - {gone})
    return (voters.index(node) - raft.term) % len(voters) if node in voters else len(voters)


def tick(raft: Raft) -> None:
    """Time passes for a node that does not lead."""
    candidacy = raft.candidacy
    raft.election_elapsed += 1
    if candidacy.delay > 0:
        candidacy.delay -= 1
        if candidacy.delay == 0:
            candidacy.delay = -1
            campaign(raft, EVIDENCE)
            return
    timeout = raft.election_timeout
    if raft.leader == 0 and raft.conf.voters == (raft.node_id,) and not raft.conf.joint:
        timeout = 1  # there is nobody to wait for
    if raft.election_elapsed >= timeout:
        raft.election_elapsed = 0
        if raft.leader:
            raft.set_leader(0)
        campaign(raft, EVIDENCE if candidacy.evidence else TIMEOUT)
    elif raft.role is Role.PRE_CANDIDATE:
        candidacy.retry -= 1
        if candidacy.retry <= 0:
            candidacy.retry = raft.config.evidence_retry_ticks
            _ask_pre_votes(raft)
