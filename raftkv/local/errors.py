"""What can go wrong with a local cluster. Each error carries fields and says what to do, in one line."""

from __future__ import annotations

from pathlib import Path


class LocalClusterError(Exception):
    """Base of all errors of a local cluster. The text is one line, fit for a terminal."""


class PortInUse(LocalClusterError):
    """A port that a node was to listen on belongs to somebody else."""

    def __init__(self, port: int, use: str, host: str) -> None:
        self.port = port
        self.use = use
        self.host = host
        super().__init__(
            f"port {port} on {host} ({use}) is already in use: "
            f"stop what listens there, or choose other ports with --base-port (0 takes free ones)"
        )


class NodeExited(LocalClusterError):
    """A node's process ended when it should have run."""

    def __init__(self, name: str, exit_code: int, last_line: str, log: Path) -> None:
        self.name = name
        self.exit_code = exit_code
        self.last_line = last_line
        self.log = log
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"exited with code {exit_code}"
        super().__init__(f"node {name} {how}: {last_line or 'it said nothing'} (log: {log})")


class NotReady(LocalClusterError):
    """The cluster did not reach the wanted state in time."""

    def __init__(self, wanted: str, timeout_s: float, seen: str) -> None:
        self.wanted = wanted
        self.timeout_s = timeout_s
        self.seen = seen
        super().__init__(f"not {wanted} after {timeout_s:g} s; last seen: {seen}")


class UnknownNode(LocalClusterError):
    """A target names no node of this cluster, or asks for a leader when there is none."""

    def __init__(self, target: str, names: tuple[str, ...], reason: str = "no such node") -> None:
        self.target = target
        self.names = names
        super().__init__(f"{target!r}: {reason}; the nodes are {', '.join(names)}")


class ClusterRunning(LocalClusterError):
    """Another supervisor already runs a cluster in this directory."""

    def __init__(self, directory: Path, pid: int | None) -> None:
        self.directory = directory
        self.pid = pid
        who = f" (pid {pid})" if pid else ""
        super().__init__(
            f"a cluster is already running in {directory}{who}: use it, stop it with 'raftkv cluster down', "
            f"or choose another --dir"
        )


class ClusterNotRunning(LocalClusterError):
    """No supervisor answers for this directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        super().__init__(f"no cluster is running in {directory}: start one with 'raftkv cluster up', or give its --dir")


class TopologyMismatch(LocalClusterError):
    """The directory holds a cluster of another shape than the one asked for."""

    def __init__(self, directory: Path, field: str, stored: int, wanted: int) -> None:
        self.directory = directory
        self.field = field
        self.stored = stored
        self.wanted = wanted
        super().__init__(
            f"{directory} holds a cluster with {field} {stored}, not {wanted}: leave the option out to go on with it, "
            f"choose another --dir, or remove it with 'raftkv cluster down --remove'"
        )
