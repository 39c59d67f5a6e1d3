"""Transcripts: a story of a few bare Raft nodes, told in commands, with what they did recorded below.

A file is a list of blocks, separated by empty lines: comments and commands, a line of dashes, the output. All
blocks of a file tell of one cluster. What a command that ends in `quiet` brings about is not recorded.

    nodes 3 [learners 3] [FIELD=VALUE ...]   start; fields of RaftConfig, beside those of the test harness
    log NODE TERM ... [term=T] [commit=C]    start again with this log on disk
    set NODE FIELD=VALUE                     start again with another configuration
    conf CONF                                start all again with this conf state: `1 2` or `1 2 & 2 3`
    campaign NODE                            stand for election
    elect NODE                               the same, and all that follows from it, unrecorded
    propose NODE TEXT ...                    one entry for each word
    change NODE +4 ~5 -1                     a conf change: voter, learner, removed
    start NODE                               a new node with an empty disk
    read NODE ...                            a linearizable read on each
    transfer NODE TARGET                     hand leadership over
    evidence NODE of LEADER                  NODE knows that LEADER's process is gone
    crash NODE ... / restart NODE ...        what was not synced is lost
    disk NODE slow|good / persist NODE       writes wait for `persist`
    compact NODE [INDEX]                     drop the log up to there
    cut 1 | 2 3 / block 1 -> 2 / heal        the network
    lose KIND ... [from NODE] [to NODE]      also these messages get lost, until `heal`
    join 1 - 2                               these two hear each other, whatever was cut
    tick [NODE] TICKS                        time passes, everything settles after each tick
    until leader / until 3 leads             time passes until it is so; says how long
    settle                                   until nothing moves any more
    step [ROUNDS]                            what is on the wire arrives, the answers are put on it
    status [NODE ...] / progress NODE / state NODE / log? NODE
    show heartbeats                          they are left out otherwise
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from raftkv.raft import describe, messages
from raftkv.raft.config import RaftConfig
from raftkv.raft.errors import RaftRefused
from raftkv.raft.messages import Heartbeat, HeartbeatReply
from raftkv.raft.ready import Ready
from raftkv.raft.types import ConfChange, ConfChangeKind, ConfState, Entry, EntryKind, HardState, Role
from tests.unit.raft.harness import FAST, Cluster, Envelope, Node

SIGNS = {"+": ConfChangeKind.ADD_VOTER, "~": ConfChangeKind.ADD_LEARNER, "-": ConfChangeKind.REMOVE}
MESSAGE_KINDS = {name: getattr(messages, name) for name in messages.__all__ if name != "Message"}
UNTIL_TICKS_MAX = 500


class BadTranscript(Exception):
    """A command that cannot be understood; names the line."""


def configured(config: RaftConfig, words: Sequence[str]) -> RaftConfig:
    """`config` with fields from `name=value` words."""
    changes: dict[str, int | bool] = {}
    for word in words:
        name, _, value = word.partition("=")
        changes[name] = value == "true" if value in ("true", "false") else int(value)
    return replace(config, **changes)  # type: ignore[arg-type]


def conf_state(text: str) -> ConfState:
    """`1 2`, `1 2 & 2 3`."""
    voters, _, outgoing = text.partition("&")
    return ConfState(tuple(map(int, voters.split())), tuple(map(int, outgoing.split())))


class Transcript:
    """One cluster and the record of what it does."""

    def __init__(self) -> None:
        self.cluster = Cluster(0)
        self.lines: list[str] = []
        self.quiet = False
        self.heartbeats = False
        self.context = 0
        self._together: tuple[Envelope, str, list[int]] | None = None  # equal messages to several nodes

    def run(self, text: str) -> str:
        """Run all blocks of a file; the file with the outputs as they are now."""
        blocks = []
        for block in text.strip("\n").split("\n\n"):
            script, _, _ = block.partition("\n----")
            self.lines = []
            for line in script.splitlines():
                self.command(line)
            self.flush()
            blocks.append(script + "\n----\n" + "".join(line.rstrip() + "\n" for line in self.lines))
        return "\n".join(blocks)

    def command(self, line: str) -> None:
        """Carry out one line."""
        words = line.split("#")[0].split()
        if not words:
            return
        handler: Callable[[list[str]], None] | None = getattr(self, "do_" + words[0].replace("log?", "log_of"), None)
        if handler is None:
            raise BadTranscript(f"no command {words[0]!r}: {line}")
        self.flush()
        self.quiet = words[-1] == "quiet"
        if self.quiet:
            words.pop()
        try:
            handler(words[1:])
        except RaftRefused as refused:
            self.say(words[1], "refused", str(refused))
        except (ValueError, IndexError, KeyError) as error:
            raise BadTranscript(f"{line}: {error!r}") from error
        self.flush()
        self.quiet = False

    # The record.

    def say(self, who: object, what: str, text: str) -> None:
        """Add a line."""
        self.flush()
        if not self.quiet:
            self.lines.append(f"{f'{who} {what}':<11}{text}")

    def flush(self) -> None:
        """Write the messages that were gathered into one line."""
        if self._together is not None:
            envelope, fate, receivers = self._together
            self._together = None
            head = f"{envelope.sender} -> {', '.join(map(str, receivers))}"
            if not self.quiet:
                self.lines.append(
                    f"{head:<11}{'' if len(head) < 11 else ' '}{describe.message(envelope.message)}{fate}"
                )

    def watch(self, node: Node, ready: Ready) -> None:
        """What a node does."""
        for event in ready.events:
            if event.kind not in ("vote_granted", "stepped_down", "snapshot_needed") or event.by == 0:
                self.say(node.id, "event", describe.event(event))
        parts = []
        if ready.install is not None:
            parts.append(f"install={describe.snapshot(ready.install)}")
        if ready.hard_state is not None and ready.hard_state.term != node.disk.hard_state.term:
            parts.append(f"term={ready.hard_state.term}")
        if ready.hard_state is not None and ready.hard_state.vote != node.disk.hard_state.vote:
            parts.append(f"vote={ready.hard_state.vote or 'none'}")
        if ready.entries:
            parts.append(f"entries={describe.entries(ready.entries)}")
        if ready.committed:
            parts.append(f"applies={describe.entries(ready.committed)}")
        if ready.reads:
            parts.append(f"reads at {', '.join(str(index) for _, index in ready.reads)}")
        if ready.dropped_reads:
            parts.append(f"{len(ready.dropped_reads)} reads must be asked again")
        if ready.send_snapshots:
            parts.append(f"snapshot for {', '.join(str(peer) for peer, _ in ready.send_snapshots)}")
        if parts:
            self.say(node.id, "ready", " ".join(parts))

    def delivered(self, envelope: Envelope, ok: bool) -> None:
        """What happens to a message."""
        if not self.heartbeats and isinstance(envelope.message, (Heartbeat, HeartbeatReply)) and envelope.message.token:
            return
        node = self.cluster.nodes.get(envelope.to)
        fate = ""
        if not ok:
            if (envelope.sender, envelope.to) in self.cluster.cuts:
                fate = "   (cut)"
            else:
                fate = "   (lost)" if node is not None and node.up else "   (down)"
        if self._together is not None:
            first, fate_of_first, receivers = self._together
            same = (first.sender, first.message, fate_of_first) == (envelope.sender, envelope.message, fate)
            if same and envelope.to not in receivers:
                receivers.append(envelope.to)
                return
        self.flush()
        self._together = (envelope, fate, [envelope.to])

    # The commands.

    def do_nodes(self, words: list[str]) -> None:
        size, fields = int(words[0]), words[1:]
        learners: list[int] = []
        if fields and fields[0] == "learners":
            learners = [int(word) for word in fields[1:] if word.isdigit()]
            fields = fields[1 + len(learners) :]
        self.cluster = Cluster(size, learners=learners, config=configured(FAST, fields))
        self.cluster.watch = self.watch
        self.cluster.delivered = self.delivered

    def do_set(self, words: list[str]) -> None:
        node = self.node(words[0])
        config = configured(node.raft.config, words[1:])
        node.restart()
        node.raft.config = config

    def do_conf(self, words: list[str]) -> None:
        for node in self.cluster:
            node.disk.meta = replace(node.disk.meta, conf=conf_state(" ".join(words)))
            node.restart()

    def do_log(self, words: list[str]) -> None:
        node = self.node(words[0])
        terms = [int(word) for word in words[1:] if "=" not in word]
        fields = dict(word.split("=") for word in words[1:] if "=" in word)
        log = [Entry(index, term, EntryKind.NORMAL, b"") for index, term in enumerate(terms, 1)]
        commit = int(fields.get("commit", 0))
        node.disk.log = log
        node.disk.state = log[:commit]
        node.disk.hard_state = HardState(int(fields.get("term", terms[-1])), 0, commit)
        node.restart()

    def do_campaign(self, words: list[str]) -> None:
        self.node(words[0]).raft.campaign()

    def do_elect(self, words: list[str]) -> None:
        self.quiet = True
        self.cluster.elect(int(words[0]))

    def do_propose(self, words: list[str]) -> None:
        self.node(words[0]).raft.propose([word.encode() for word in words[1:]])

    def do_change(self, words: list[str]) -> None:
        changes = tuple((SIGNS[word[0]], int(word[1:])) for word in words[1:])
        self.node(words[0]).raft.propose_conf_change(ConfChange(changes))

    def do_start(self, words: list[str]) -> None:
        self.cluster.add(int(words[0]), self.cluster.conf)

    def do_read(self, words: list[str]) -> None:
        for word in words:
            self.context += 1
            self.node(word).raft.read_index(self.context)

    def do_transfer(self, words: list[str]) -> None:
        self.node(words[0]).raft.transfer_leadership(int(words[1]))

    def do_evidence(self, words: list[str]) -> None:
        self.node(words[0]).raft.leader_unreachable(int(words[2]))

    def do_crash(self, words: list[str]) -> None:
        for word in words:
            self.node(word).crash()

    def do_restart(self, words: list[str]) -> None:
        for word in words:
            self.node(word).restart()

    def do_disk(self, words: list[str]) -> None:
        self.node(words[0]).slow_disk = {"slow": True, "good": False}[words[1]]

    def do_persist(self, words: list[str]) -> None:
        if not self.node(words[0]).persist():
            raise BadTranscript(f"node {words[0]} has nothing to persist")

    def do_compact(self, words: list[str]) -> None:
        self.node(words[0]).compact(int(words[1]) if words[1:] else None)

    def do_cut(self, words: list[str]) -> None:
        self.cluster.cut(*([int(node) for node in group.split()] for group in " ".join(words).split("|")))

    def do_block(self, words: list[str]) -> None:
        self.cluster.block(int(words[0]), int(words[2]))

    def do_join(self, words: list[str]) -> None:
        one, other = int(words[0]), int(words[2])
        self.cluster.cuts -= {(one, other), (other, one)}

    def do_heal(self, words: list[str]) -> None:
        self.cluster.heal()

    def do_lose(self, words: list[str]) -> None:
        kinds = tuple(MESSAGE_KINDS[word] for word in words if word in MESSAGE_KINDS)
        sender = int(words[words.index("from") + 1]) if "from" in words else 0
        to = int(words[words.index("to") + 1]) if "to" in words else 0
        others = self.cluster.drop
        self.cluster.drop = lambda envelope: (
            others(envelope)
            or (isinstance(envelope.message, kinds) and sender in (0, envelope.sender) and to in (0, envelope.to))
        )

    def do_tick(self, words: list[str]) -> None:
        self.cluster.tick(int(words[-1]), only=int(words[0]) if len(words) > 1 else 0)

    def do_until(self, words: list[str]) -> None:
        wanted = int(words[0]) if words[0] != "leader" else 0
        known = {node.id: node.raft.term for node in self.cluster if node.up and node.role is Role.LEADER}
        for ticks in range(UNTIL_TICKS_MAX):
            leader = self.cluster.leader()
            if (
                leader is not None
                and leader.raft.commit >= leader.raft.term_start
                and (leader.id == wanted or (not wanted and known.get(leader.id) != leader.raft.term))
            ):
                self.say(leader.id, "leads", f"term {leader.raft.term}, after {ticks} ticks")
                return
            self.cluster.tick()
        raise BadTranscript(f"until {words[0]}: not within {UNTIL_TICKS_MAX} ticks")

    def do_settle(self, words: list[str]) -> None:
        self.cluster.settle()

    def do_step(self, words: list[str]) -> None:
        for _ in range(int(words[0]) if words else 1):
            self.cluster.work()
            for _ in range(len(self.cluster.wire)):
                self.cluster.deliver(self.cluster.wire.popleft())
        self.cluster.work()

    def do_status(self, words: list[str]) -> None:
        for node in self.cluster:
            if not words or str(node.id) in words:
                text = describe.status(node.raft.status()) if node.up else "down"
                self.say(node.id, "status", text)

    def do_progress(self, words: list[str]) -> None:
        for line in describe.progress(self.node(words[0]).raft.status()):
            self.say(words[0], "knows", line)

    def do_state(self, words: list[str]) -> None:
        for word in words:
            node = self.node(word)
            self.say(word, "state", " ".join(item.decode() for item in node.data) or "(empty)")

    def do_log_of(self, words: list[str]) -> None:
        for word in words:
            self.say(word, "log", describe.entries(self.node(word).log()))

    def do_show(self, words: list[str]) -> None:
        self.heartbeats = words == ["heartbeats"]

    def node(self, word: str) -> Node:
        return self.cluster[int(word)]
