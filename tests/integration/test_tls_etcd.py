"""The SDK over TLS, against an etcd that asks for client certificates; and what is said where the two do not fit."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raftkv.client import TLS, AsyncClient, Client, ConfigError, Unavailable
from raftkv.local.ports import lease_free

pytestmark = [pytest.mark.system, pytest.mark.integration]

START_S = 60.0


class Authority:
    """A certificate authority of this test's own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.ca = folder / "ca.pem"
        subject = f"/CN=raftkv test {folder.name}"
        self._openssl("req", "-x509", *self._fresh("ca"), "-days", "2", "-subj", subject, "-out", "ca.pem")

    def issue(self, name: str, alternatives: str) -> tuple[Path, Path]:
        """A certificate for servers and clients, and its key."""
        (self.folder / f"{name}.ext").write_text(
            f"subjectAltName={alternatives}\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        self._openssl("req", *self._fresh(name), "-subj", f"/CN={name}", "-out", f"{name}.csr")
        self._openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.pem"),
        )
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def _fresh(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@dataclass(frozen=True)
class Secured:
    """An etcd that speaks TLS only."""

    endpoint: str
    authority: Authority
    cert: Path
    key: Path

    @property
    def tls(self) -> TLS:
        """What fits."""
        return TLS(ca=self.authority.ca, cert=self.cert, key=self.key)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if shutil.which("openssl") is None:
        raise FileNotFoundError("no openssl on PATH")
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority(folder / "ours")
    server, server_key = authority.issue("server", "IP:127.0.0.1,DNS:etcd.test")
    lease = lease_free(2)
    client, peer = f"https://127.0.0.1:{lease.ports[0]}", f"http://127.0.0.1:{lease.ports[1]}"
    arguments = [
        *("etcd", "--name", "n1", "--data-dir", str(folder / "data"), "--initial-cluster", f"n1={peer}"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--logger", "zap"),
        *("--cert-file", str(server), "--key-file", str(server_key)),
        *("--client-cert-auth", "--trusted-ca-file", str(authority.ca)),
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(arguments, stdout=log, stderr=log) as process:
        try:
            found = Secured(f"127.0.0.1:{lease.ports[0]}", authority, *authority.issue("client", "DNS:client.test"))
            with Client(f"https://{found.endpoint}", tls=found.tls, timeout=START_S) as ready:
                ready.put("ready", "yes")
            yield found
        finally:
            process.kill()
            lease.release()


async def test_everything_goes_over_tls(secured: Secured) -> None:
    async with AsyncClient(secured.endpoint, tls=secured.tls, timeout=30) as client:
        await client.put("k", "v")
        item = await client.get("k")
        assert item is not None
        assert item.text == "v"
        async with client.watch("w") as watch, client.lock("l") as lock:
            await client.put("w", "1", guards=[lock.guard()])
            assert (await anext(watch)).value == b"1"
        async with client.lease(30) as lease:
            assert lease.id in await client.leases()
        async with client.election("e").campaign("me"):
            leader = await client.election("e").leader()
            assert leader is not None
            assert leader.value == b"me"
    done = await asyncio.to_thread(
        subprocess.run,
        [
            *("etcdctl", f"--endpoints=https://{secured.endpoint}", f"--cacert={secured.authority.ca}"),
            *(f"--cert={secured.cert}", f"--key={secured.key}", "get", "k", "--print-value-only"),
        ],
        env={**os.environ, "ETCDCTL_API": "3", "ETCDCTL_DIAL_TIMEOUT": "30s", "ETCDCTL_COMMAND_TIMEOUT": "30s"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"v\n"


@pytest.mark.timeout(300)  # some thirty processes
def test_commands_over_tls(secured: Secured, tmp_path: Path) -> None:
    names = {"CACERT": str(secured.authority.ca), "CERT": str(secured.cert), "KEY": str(secured.key)}
    flags = [f"--{name.lower()}={path}" for name, path in names.items()]
    endpoint = f"--endpoints=https://{secured.endpoint}"

    def raftkv(*arguments: str, **variables: str) -> tuple[int, str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("RAFTKV_", "ETCDCTL_"))}
        done = subprocess.run(
            [sys.executable, "-m", "raftkv", "--timeout", "30s", *arguments],
            env={**mine, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=100,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    assert raftkv("put", "cli", "1", endpoint, *flags) == (0, "OK\n", "")
    for prefix in ("RAFTKV_", "ETCDCTL_"):
        variables = {f"{prefix}{name}": path for name, path in names.items()}
        shown = raftkv("get", "cli", **variables, **{f"{prefix}ENDPOINTS": f"https://{secured.endpoint}"})
        assert shown == (0, "cli\n1\n", "")
        assert raftkv(*flags, endpoint, "get", "cli", **{f"{prefix}CACERT": "nosuch"}) == shown
    for words in ("status", "status --cluster", "health", "hash", "lease list", "member list", "defrag"):
        assert raftkv(*words.split(), endpoint, *flags)[::2] == (0, ""), words
    code, out, _ = raftkv("lease", "grant", "100", "-o", "json", endpoint, *flags)
    assert code == 0
    lease = f"{json.loads(out)['ID']:x}"
    assert raftkv("lease", "keep-alive", "--once", lease, endpoint, *flags)[0] == 0
    assert raftkv("lease", "revoke", lease, endpoint, *flags)[0] == 0
    assert raftkv("snapshot", "save", str(tmp_path / "snap"), endpoint, *flags)[0] == 0
    # A command that is run under it gets there as well.
    script = f"{sys.executable} -m raftkv get cli --print-value-only; exit 9"
    assert raftkv("lock", "l", endpoint, *flags, "--", "sh", "-c", script) == (9, "1\n", "")
    code, out, error = raftkv("watch", "cli", "--rev", "1", endpoint, *flags, "--", "sh", "-c", script)
    assert (code, out) == (1, "PUT\ncli\n1\n1\n"), error
    # What does not fit is said.
    for words in ("get cli", "status", "snapshot save nothing"):
        code, out, error = raftkv(*words.split(), endpoint, "--timeout", "4s")
        assert (code, out) == (1, ""), words
        assert "CERTIFICATE_VERIFY_FAILED" in error, words
    assert not Path("nothing.part").exists()


async def test_the_bytes_of_the_files_do_as_well(secured: Secured) -> None:
    tls = TLS(
        ca=secured.authority.ca.read_bytes(), cert=secured.cert.read_bytes(), key=secured.key.read_bytes(),
        server_name="etcd.test",
    )  # fmt: skip
    assert "PRIVATE" not in repr(tls)
    async with AsyncClient(secured.endpoint, tls=tls, timeout=30) as client:
        assert await client.get("ready") is not None


async def refusal(secured: Secured, tls: TLS | None) -> str:
    """What a client that does not get through says, within its time."""
    began = time.monotonic()
    async with AsyncClient(secured.endpoint, tls=tls, timeout=4) as client:
        with pytest.raises(Unavailable) as caught:
            await client.put("k", "v")
    assert time.monotonic() - began < 20
    return str(caught.value)


async def test_a_server_of_another_authority_is_not_trusted(secured: Secured, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    text = await refusal(secured, TLS(ca=other.ca, cert=secured.cert, key=secured.key))
    assert f"no endpoint could be reached: {secured.endpoint}" in text
    assert "CERTIFICATE_VERIFY_FAILED" in text
    assert "CERTIFICATE_VERIFY_FAILED" in await refusal(secured, TLS(cert=secured.cert, key=secured.key))


async def test_a_server_of_another_name_is_not_trusted(secured: Secured) -> None:
    text = await refusal(secured, TLS(ca=secured.authority.ca, server_name="other.test"))
    assert "other.test" in text or "Hostname Verification" in text, text


async def test_a_client_of_another_authority_is_refused(secured: Secured, tmp_path: Path) -> None:
    cert, key = Authority(tmp_path / "other").issue("client", "DNS:client.test")
    assert "no endpoint could be reached" in await refusal(secured, TLS(ca=secured.authority.ca, cert=cert, key=key))
    assert "no endpoint could be reached" in await refusal(secured, TLS(ca=secured.authority.ca))


async def test_plain_text_to_a_server_with_tls(secured: Secured) -> None:
    assert "no endpoint could be reached" in await refusal(secured, None)


def test_a_scheme_must_fit(secured: Secured) -> None:
    with pytest.raises(ConfigError, match="needs TLS"):
        Client(f"https://{secured.endpoint}")
    with pytest.raises(ConfigError, match="without TLS"):
        Client(f"http://{secured.endpoint}", tls=secured.tls)
