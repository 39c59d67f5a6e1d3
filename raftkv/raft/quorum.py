"""What a majority has agreed on, plain or joint.

A joint conf state needs a majority of both sets of voters, separately (Ongaro 4.3).    See: Ongaro 3.4, 3.6.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from raftkv.raft.types import ConfState, NodeId


class VoteResult(enum.Enum):
    """How an election stands."""

    PENDING = "pending"
    WON = "won"
    LOST = "lost"
    """Enough have refused that it can no longer be won."""


def quorum_size(voters: int) -> int:
    """How many of `voters` are a majority."""
    return voters // 2 + 1


def agreed_value(conf: ConfState, values: Mapping[NodeId, int]) -> int:
    """The greatest value that a quorum has reached: the commit index of match indexes, say. Missing is 0."""
    agreed = _majority_value(conf.voters, values)
    if conf.outgoing:
        agreed = min(agreed, _majority_value(conf.outgoing, values))
    return agreed


def vote_result(conf: ConfState, votes: Mapping[NodeId, bool]) -> VoteResult:
    """How the election stands after `votes`; who is missing has not answered."""
    result = _majority_vote(conf.voters, votes)
    if not conf.outgoing:
        return result
    other = _majority_vote(conf.outgoing, votes)
    if VoteResult.LOST in (result, other):
        return VoteResult.LOST
    return result if result is other else VoteResult.PENDING


def has_quorum(conf: ConfState, nodes: Mapping[NodeId, bool]) -> bool:
    """Whether those marked True are a quorum."""
    return vote_result(conf, nodes) is VoteResult.WON


def _majority_value(voters: tuple[NodeId, ...], values: Mapping[NodeId, int]) -> int:
    if not voters:
        return 0
    reached = sorted([values.get(voter, 0) for voter in voters])
    return reached[len(voters) - quorum_size(len(voters))]


def _majority_vote(voters: tuple[NodeId, ...], votes: Mapping[NodeId, bool]) -> VoteResult:
    need = quorum_size(len(voters))
    granted = sum(1 for voter in voters if votes.get(voter) is True)
    if granted >= need:
        return VoteResult.WON
    refused = sum(1 for voter in voters if votes.get(voter) is False)
    return VoteResult.LOST if len(voters) - refused < need else VoteResult.PENDING
