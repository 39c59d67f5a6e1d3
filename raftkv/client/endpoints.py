"""Which addresses a client talks to: from an argument, the environment, or a URL.

Everything here is checked before anything is opened; what is wrong is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from raftkv.client.errors import ConfigError

DEFAULT_ENDPOINT: Final = "127.0.0.1:2379"
DEFAULT_PORT: Final = 2379
PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
NO_PROXIES: Final = ("no_grpc_proxy", "no_proxy")
ENVIRONMENT: Final = ("RAFTKV_ENDPOINTS", "ETCDCTL_ENDPOINTS")
URL_SCHEMES: Final = ("raftkv", "etcd")
URL_OPTIONS: Final = ("timeout", "routing", "consistency")

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9_.-]+)?")


def resolve_endpoints(
    endpoints: str | Sequence[str] | None, environment: Mapping[str, str] | None = None, *, tls: bool = False
) -> tuple[str, ...]:
    """The endpoints to use, each as `host:port` (IPv6 hosts in brackets), in the given order, without repetition.

    Args:
        endpoints: "h1:2379,h2:2379", a sequence of such, or None for RAFTKV_ENDPOINTS, then ETCDCTL_ENDPOINTS, then
            127.0.0.1:2379.
        environment: instead of `os.environ`.
        tls: whether the client will speak TLS, so `https://` may stand before an endpoint, and `http://` may not.
    Raises:
        ConfigError: names the argument or the variable, and the text that is no endpoint.
    """
    source = "endpoints"
    if endpoints is None:
        variables = os.environ if environment is None else environment
        for name in ENVIRONMENT:
            if variables.get(name, "").strip():
                endpoints, source = variables[name], name
                break
        else:
            return (DEFAULT_ENDPOINT,)
    texts = endpoints.split(",") if isinstance(endpoints, str) else list(endpoints)
    if not texts:
        raise ConfigError(source, "no endpoint given")
    return tuple(dict.fromkeys(parse_endpoint(text, source, tls=tls) for text in texts))


def parse_endpoint(text: str, source: str = "endpoints", *, tls: bool = False) -> str:
    """One endpoint, normalised to `host:port`; a leading `http://` (with TLS: `https://`) is dropped."""
    if not isinstance(text, str):
        raise ConfigError(source, f"{text!r} is not text")
    bare = text.strip()
    scheme, separator, rest = bare.partition("://")
    if separator:
        if scheme not in ("http", "https"):
            raise ConfigError(source, f"{text!r}: unknown scheme {scheme!r}; use host:port")
        if tls and scheme == "http":
            raise ConfigError(source, f"{text!r} is an endpoint without TLS, and the client was given `tls`")
        if not tls and scheme == "https":
            raise ConfigError(source, f"{text!r} needs TLS: give the client `tls=raftkv.client.TLS(ca=…)`")
        bare = rest.removesuffix("/")
    if not bare:
        raise ConfigError(source, f"{text!r} is an empty endpoint; expected host:port")
    host, port = _split(bare, text, source)
    if host.startswith("["):
        valid = _IPV6.fullmatch(host[1:-1]) is not None
    else:
        valid = _HOST.fullmatch(host) is not None
    if not valid:
        raise ConfigError(source, f"{text!r}: {host!r} is not a host name or address; expected host:port")
    return f"{host}:{port}"


def is_proxied(endpoint: str, environment: Mapping[str, str] | None = None) -> bool:
    """Whether gRPC reaches `host:port` through an HTTP proxy, which the environment names. Rather yes than no: of
    `no_proxy`, gRPC understands more than suffixes."""
    variables = os.environ if environment is None else environment
    if not any(variables.get(name) for name in PROXIES):
        return False
    spared = next((variables[name] for name in NO_PROXIES if variables.get(name)), "")
    host = endpoint.rpartition(":")[0].strip("[]")
    return not any(host.endswith(suffix) for suffix in spared.replace(" ", "").split(",") if suffix)


def _split(bare: str, text: str, source: str) -> tuple[str, int]:
    if bare.startswith("["):
        host, bracket, rest = bare.partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigError(source, f"{text!r}: expected [IPv6 address]:port")
        host, port_text = host + "]", rest[1:] if rest else str(DEFAULT_PORT)
    elif bare.count(":") > 1:
        raise ConfigError(source, f"{text!r}: an IPv6 address must be in brackets: [address]:port")
    else:
        host, colon, port_text = bare.partition(":")
        port_text = port_text if colon else str(DEFAULT_PORT)
    if not (port_text.isascii() and port_text.isdigit() and 1 <= int(port_text[:6]) <= 65535):
        raise ConfigError(source, f"{text!r}: port {port_text!r} is not a number from 1 to 65535")
    return host, int(port_text)


@dataclass(frozen=True, slots=True)
class ParsedUrl:
    """What a `raftkv://` URL says."""

    endpoints: tuple[str, ...]
    namespace: str
    options: Mapping[str, str] = field(default_factory=dict)


def parse_url(url: str) -> ParsedUrl:
    """Take apart `raftkv://h1:2379,h2:2379/namespace?timeout=2&routing=leader`.

    Raises:
        ConfigError: names the part of the URL that is wrong.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError("url", f"{url!r}: {error}") from None
    if parts.scheme not in URL_SCHEMES:
        raise ConfigError("url", f"scheme {parts.scheme!r} is not raftkv:// (or etcd://)")
    if "@" in parts.netloc:
        # Not echoed: it may hold a password.
        raise ConfigError("url", "user and password are not supported by this version")
    if parts.fragment:
        raise ConfigError("url", f"a fragment (#{parts.fragment}) has no meaning here")
    options: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in URL_OPTIONS:
            raise ConfigError("url", f"unknown option {name!r}{nearest(name, URL_OPTIONS)}")
        if name in options:
            raise ConfigError("url", f"option {name!r} is given twice")
        options[name] = value
    endpoints = resolve_endpoints([parse_endpoint(text, "url") for text in parts.netloc.split(",")])
    return ParsedUrl(endpoints, unquote(parts.path.removeprefix("/")), options)


def nearest(name: str, known: Sequence[str]) -> str:
    """ " (did you mean 'x'?)" or the list of what there is."""
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (there are: {', '.join(known)})"
