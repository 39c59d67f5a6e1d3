"""TLS between a client and its cluster: whom it trusts, and how it shows who it is.

    AsyncClient("https://10.0.0.1:2379", tls=TLS(ca="ca.pem", cert="client.pem", key="client-key.pem"))

Files are read when this is made, so that what is wrong with one is said then, with its name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc

from raftkv.client.errors import ConfigError

Pem = str | os.PathLike[str] | bytes
"""The path of a PEM file, or its contents as bytes."""

CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
PRIVATE_KEY: Final = b"PRIVATE KEY-----"


@dataclass(frozen=True, slots=True, kw_only=True)
class TLS:
    """How a client's connections are made secure. Each of the first three is a path, or the PEM itself as bytes.

    Raises:
        ConfigError: names the field: a file that cannot be read or holds something else, a certificate without its key.
    """

    ca: Pem | None = None
    """Certificates of the authorities that may vouch for servers; None: those that gRPC comes with."""
    cert: Pem | None = None
    """The client's certificate (and the chain above it), where servers ask for one."""
    key: Pem | None = field(default=None, repr=False)
    """The private key of `cert`, not encrypted."""
    server_name: str | None = None
    """The name that the servers' certificates must bear, instead of the host of each endpoint."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            missing = "cert" if self.cert is None else "key"
            raise ConfigError(f"tls.{missing}", "missing: a certificate and its private key go together")
        # Read once, here: later a relative path may mean another file.
        for name, wanted in (("ca", CERTIFICATE), ("cert", CERTIFICATE), ("key", PRIVATE_KEY)):
            object.__setattr__(self, name, _pem(f"tls.{name}", getattr(self, name), wanted))

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel of gRPC."""
        assert not isinstance(self.ca, str | os.PathLike)
        assert not isinstance(self.cert, str | os.PathLike)
        assert not isinstance(self.key, str | os.PathLike)
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def channel_options(self) -> dict[str, str]:
        """The options that such a channel needs."""
        return {} if self.server_name is None else {"grpc.ssl_target_name_override": self.server_name}


def _pem(name: str, source: Pem | None, wanted: bytes) -> bytes | None:
    if source is None:
        return None
    if isinstance(source, bytes):
        told, pem = "the bytes", source
    else:
        told = repr(os.fspath(source))
        try:
            pem = Path(source).read_bytes()
        except OSError as error:
            raise ConfigError(name, f"cannot read {told}: {error.strerror or error}") from None
        except ValueError as error:
            raise ConfigError(name, f"{told} is no path: {error}") from None
    if wanted not in pem:
        kind = "private key" if wanted is PRIVATE_KEY else "certificate"
        raise ConfigError(name, f"{told}: no {kind} in PEM form in it")
    if wanted is PRIVATE_KEY and b"ENCRYPTED" in pem:
        raise ConfigError(name, f"{told}: the key is encrypted; gRPC needs it in the clear")
    return pem
