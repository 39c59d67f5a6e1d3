"""Endpoints, from wherever they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.client import AsyncClient, ConfigError
from raftkv.client.endpoints import parse_endpoint, parse_url, resolve_endpoints


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("127.0.0.1:2379", "127.0.0.1:2379"),
        ("localhost", "localhost:2379"),
        (" node-1.example.com:12379 ", "node-1.example.com:12379"),
        ("http://h:1", "h:1"),
        ("http://h:1/", "h:1"),
        ("[::1]:2379", "[::1]:2379"),
        ("[fe80::1%eth0]", "[fe80::1%eth0]:2379"),
        ("my_service:80", "my_service:80"),
        ("h:65535", "h:65535"),
    ],
)
def test_endpoints_are_normalised(text, normal):
    assert parse_endpoint(text) == normal
    assert parse_endpoint(normal) == normal


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "h:", "h:0", "h:65536", "h:-1", "h:http", "h:99999999999", ":2379", "::1", "a:b:c", "[::1", "[::1]x",
        "[nonsense]:1", "h h:1", "h\n:1", "https://h:1", "ftp://h:1", "http://", "h/path:1", "h:1/path", "-h:1", "h:²",
        "\udcff:1",
    ],
)  # fmt: skip
def test_what_is_no_endpoint_is_named(text):
    with pytest.raises(ConfigError) as caught:
        parse_endpoint(text, "endpoints")
    assert caught.value.field == "endpoints"
    assert repr(text) in str(caught.value)


@given(st.text())
def test_any_text_is_an_endpoint_or_a_config_error(text):
    try:
        normal = parse_endpoint(text)
    except ConfigError:
        return
    assert parse_endpoint(normal) == normal


def test_the_environment_is_asked_in_order():
    both = {"RAFTKV_ENDPOINTS": "a:1,b:2", "ETCDCTL_ENDPOINTS": "c:3"}
    assert resolve_endpoints(None, both) == ("a:1", "b:2")
    assert resolve_endpoints(None, {"ETCDCTL_ENDPOINTS": "http://c:3"}) == ("c:3",)
    assert resolve_endpoints(None, {"RAFTKV_ENDPOINTS": "  "}) == ("127.0.0.1:2379",)
    assert resolve_endpoints("d:4", both) == ("d:4",)
    with pytest.raises(ConfigError) as caught:
        resolve_endpoints(None, {"RAFTKV_ENDPOINTS": "a:1,,b:2"})
    assert caught.value.field == "RAFTKV_ENDPOINTS"


def test_repeated_endpoints_count_once_and_none_is_an_error():
    assert resolve_endpoints(["a:1", "a:1", "http://a:1", "b:1"]) == ("a:1", "b:1")
    with pytest.raises(ConfigError):
        resolve_endpoints([])
    with pytest.raises(ConfigError):
        resolve_endpoints([5])  # type: ignore[list-item]


def test_a_url_says_endpoints_namespace_and_options():
    parsed = parse_url("raftkv://h1:1,h2/team%2Fa/?timeout=2&routing=leader")
    assert parsed.endpoints == ("h1:1", "h2:2379")
    assert parsed.namespace == "team/a/"
    assert parsed.options == {"timeout": "2", "routing": "leader"}
    client = AsyncClient.from_url("raftkv://h1:1/ns?timeout=2&consistency=serializable")
    assert client.endpoints == ("h1:1",)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://h:1/", "scheme"),
        ("raftkv://user:secret@h:1/", "not supported"),
        ("raftkv://h:1/?timeuot=2", "did you mean 'timeout'"),
        ("raftkv://h:1/?timeout=2&timeout=3", "twice"),
        ("raftkv://h:1/?timeout=soon", "not a number"),
        ("raftkv://h:1/?timeout=-1", "above 0"),
        ("raftkv://h:1/?routing=moon", "routing"),
        ("raftkv://h:1/#x", "fragment"),
        ("raftkv://h:x/", "port"),
        ("raftkv://[::1", "url"),
    ],
)
def test_what_is_wrong_in_a_url_is_named_and_no_password_is_shown(url, problem):
    with pytest.raises(ConfigError) as caught:
        AsyncClient.from_url(url)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": "1"}, "timeout"),
        ({"routing": "best"}, "routing"),
        ({"consistency": "eventual"}, "consistency"),
        ({"lost_after_s": -1}, "lost_after_s"),
        ({"event_hooks": {"leader_changed": print}}, "event_hooks"),
        ({"event_hooks": {"leader": 5}}, "event_hooks"),
    ],
)
def test_every_wrong_setting_is_named(settings, field):
    with pytest.raises(ConfigError) as caught:
        AsyncClient("h:1", **settings)
    assert caught.value.field == field
