"""Why consensus refuses a call. None of these changed anything."""

from __future__ import annotations

from raftkv.raft.types import NodeId


class ConfigError(ValueError):
    """A field of the configuration is impossible."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class RaftRefused(Exception):
    """A call that consensus does not carry out now."""


class NoLeader(RaftRefused):
    """No leader is known."""


class InvalidTransferee(RaftRefused):
    """Leadership cannot go to that node: it is no voter."""

    def __init__(self, target: NodeId) -> None:
        super().__init__(f"node {target} is no voter")
        self.target = target


class ProposalRefused(RaftRefused):
    """A proposal was not taken; nothing got into the log."""


class NotLeader(ProposalRefused):
    """Only the leader takes this; `leader` is whom we know to lead (0: nobody)."""

    def __init__(self, leader: NodeId) -> None:
        super().__init__(f"not the leader; the leader is {leader or 'unknown'}")
        self.leader = leader


class Overloaded(ProposalRefused):
    """Too many bytes wait to be committed."""

    def __init__(self, uncommitted_bytes: int, limit: int) -> None:
        super().__init__(f"{uncommitted_bytes} bytes are uncommitted, at most {limit}")
        self.uncommitted_bytes = uncommitted_bytes
        self.limit = limit


class TransferInProgress(ProposalRefused):
    """Leadership is being handed to `target`."""

    def __init__(self, target: NodeId) -> None:
        super().__init__(f"leadership is being handed to node {target}")
        self.target = target


class ConfChangePending(ProposalRefused):
    """An earlier change of the conf state is not applied, or this term has committed nothing yet."""


class InvalidConfChange(ProposalRefused):
    """The change makes no sense on the present conf state, or would leave it without a working majority."""
