"""Ports for node processes that no one else takes, not even while a node is down.

Ports come from outside the kernel's ephemeral range, because any outgoing connection may be given an ephemeral
port as its source, and a node that was killed for a second would find its port gone. Between supervisors of one
user (parallel test runs), a byte-range lock on one file, one byte a port, reserves a port for as long as its
cluster exists; the kernel drops the lock with the process, so nothing stale is left behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from raftkv.local.errors import LocalClusterError, PortInUse

_LOWEST = 10240  # below it live registered services
_HIGHEST = 65535
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_EPHEMERAL_DEFAULT = (32768, 60999)

# POSIX locks belong to the process, and closing any descriptor of the file drops them all: so one descriptor for
# the life of the process, and a set to keep two clusters of one process apart.
_mutex = threading.Lock()
_held: set[int] = set()
_descriptor: tuple[int, int] | None = None  # (pid that opened it, descriptor): locks do not survive a fork


class PortLease:
    """Ports that are ours until `release`, or until this process ends."""

    def __init__(self, ports: tuple[int, ...]) -> None:
        self.ports = ports

    def release(self) -> None:
        """Give the ports back. May be called twice."""
        ports, self.ports = self.ports, ()
        with _mutex:
            for port in ports:
                _unlock(port)


def lease_free(count: int, host: str = "127.0.0.1") -> PortLease:
    """Reserve `count` ports on which nothing listens.

    Raises:
        LocalClusterError: the machine has not that many free ports.
    """
    candidates = _candidates()
    random.shuffle(candidates)
    taken: list[int] = []
    with _mutex:
        for port in candidates:
            if len(taken) == count:
                break
            if not _lock(port):
                continue
            if is_free(port, host):
                taken.append(port)
            else:
                _unlock(port)
    lease = PortLease(tuple(taken))
    if len(taken) < count:
        lease.release()
        raise LocalClusterError(f"only {len(taken)} of {count} free ports found on {host}")
    return lease


def lease_fixed(ports: Iterable[tuple[int, str]], host: str = "127.0.0.1") -> PortLease:
    """Reserve exactly these (port, what it is for).

    Raises:
        PortInUse: somebody listens on one of them, or another cluster has reserved it; names the port.
    """
    taken: list[int] = []
    with _mutex:
        for port, use in ports:
            locked = _lock(port)
            if locked:
                taken.append(port)
            if not locked or not is_free(port, host):
                for other in taken:
                    _unlock(other)
                raise PortInUse(port, use, host)
    return PortLease(tuple(taken))


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Say whether a server could listen on this port now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port in TIME_WAIT counts as free, one with a listener does not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def _candidates() -> list[int]:
    try:
        low, high = (int(word) for word in _EPHEMERAL_RANGE.read_text().split())
    except (OSError, ValueError):
        low, high = _EPHEMERAL_DEFAULT
    outside = [port for port in range(_LOWEST, _HIGHEST) if not low <= port <= high]
    return outside if len(outside) >= 1000 else list(range(_LOWEST, _HIGHEST))


def _lock_file() -> int:
    global _descriptor
    if _descriptor is None or _descriptor[0] != os.getpid():
        path = Path(tempfile.gettempdir()) / f"raftkv-ports-{os.getuid()}.lock"
        _descriptor = (os.getpid(), os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        _held.clear()
    return _descriptor[1]


def _lock(port: int) -> bool:
    descriptor = _lock_file()
    if port in _held:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    _held.add(port)
    return True


def _unlock(port: int) -> None:
    descriptor = _lock_file()
    if port in _held:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, port)
        _held.discard(port)
