"""TLS options: what is wrong with a file is said when they are made, with its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from raftkv.client import TLS, ConfigError
from raftkv.client.endpoints import resolve_endpoints

CERT = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
KEY = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"


def test_paths_and_bytes_are_the_same(tmp_path: Path) -> None:
    for name, pem in (("ca", CERT), ("cert", CERT), ("key", KEY)):
        (tmp_path / name).write_bytes(pem)
    read = TLS(ca=tmp_path / "ca", cert=str(tmp_path / "cert"), key=tmp_path / "key", server_name="n")
    assert read == TLS(ca=CERT, cert=CERT, key=KEY, server_name="n")
    assert (read.ca, read.cert, read.key) == (CERT, CERT, KEY)
    assert read.channel_options() == {"grpc.ssl_target_name_override": "n"}
    assert TLS().channel_options() == {}
    assert "PRIVATE" not in repr(read)


@pytest.mark.parametrize(
    ("settings", "name", "text"),
    [
        ({"cert": CERT}, "tls.key", "go together"),
        ({"key": KEY}, "tls.cert", "go together"),
        ({"ca": "/no/such/file"}, "tls.ca", "cannot read '/no/such/file': No such file"),
        ({"ca": "a\0b"}, "tls.ca", "is no path"),
        ({"ca": b""}, "tls.ca", "no certificate in PEM form"),
        ({"ca": KEY}, "tls.ca", "no certificate in PEM form"),
        ({"cert": CERT, "key": CERT}, "tls.key", "no private key in PEM form"),
        ({"cert": CERT, "key": KEY.replace(b"PRIVATE", b"ENCRYPTED PRIVATE")}, "tls.key", "encrypted"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, str | bytes], name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        TLS(**settings)  # type: ignore[arg-type]
    assert caught.value.field == name


def test_schemes() -> None:
    assert resolve_endpoints("https://h:1/,h:2", tls=True) == ("h:1", "h:2")
    with pytest.raises(ConfigError, match="without TLS"):
        resolve_endpoints("http://h:1", tls=True)
    with pytest.raises(ConfigError, match=r"needs TLS: give the client `tls=raftkv.client.TLS"):
        resolve_endpoints("https://h:1")
