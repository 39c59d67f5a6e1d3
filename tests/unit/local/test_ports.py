from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raftkv.local import PortInUse, ports


def test_free_ports_are_distinct_and_outside_the_ephemeral_range() -> None:
    first = ports.lease_free(10)
    second = ports.lease_free(10)
    try:
        assert len({*first.ports, *second.ports}) == 20
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        assert not any(low <= port <= high for port in first.ports)
    finally:
        first.release()
        second.release()
        second.release()


def test_a_port_with_a_listener_is_named_in_the_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"port {port} on 127.0.0.1 \(n1, clients\) is already in use") as raised:
            ports.lease_fixed([(port, "n1, clients")])
    assert raised.value.port == port


def test_a_failed_lease_gives_back_what_it_had_taken() -> None:
    free = ports.lease_free(1)
    (port,) = free.ports
    free.release()
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(PortInUse):
        ports.lease_fixed([(port, "a"), (listener.getsockname()[1], "b")])
    ports.lease_fixed([(port, "a")]).release()


def test_another_process_cannot_lease_what_is_leased_here_until_it_is_released() -> None:
    held = ports.lease_free(1)
    code = f"from raftkv.local import ports; ports.lease_fixed([({held.ports[0]}, 'x')])"

    def elsewhere() -> int:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode

    assert elsewhere() == 1
    held.release()
    assert elsewhere() == 0
