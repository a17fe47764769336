"""HTTPS: certificates of the server and of clients, and mistakes with them."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from api.config import ServerConfig
from api.flags import ConfigError
from api.server.run import check_tls
from tests.e2e.server import PATIENCE, Server

SIMULATED = ("--distributed-executor-backend", "simulated")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the server's key and certificate, and that of the authority."""
    folder = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return folder


def test_https(tiny_model: Path, authority: trustme.CA, files: Path) -> None:
    flags = [
        "--ssl-keyfile",
        files / "key.pem",
        "--ssl-certfile",
        files / "cert.pem",
        "--ssl-ca-certs",
        files / "ca.pem",
    ]
    with Server(str(tiny_model), *SIMULATED, *map(str, flags), "--ssl-cert-reqs", "2") as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(files / "ca.pem"))
        with pytest.raises(httpx.HTTPError), httpx.Client(verify=trusting, timeout=PATIENCE) as stranger:
            stranger.get(f"{server.url}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/health", timeout=PATIENCE)
        authority.issue_cert("client@example.org").configure_cert(trusting)
        body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True}
        with httpx.Client(verify=trusting, base_url=server.url, timeout=PATIENCE) as client:
            assert client.get("/health").status_code == 200
            usage = client.post("/v1/completions", json=body).json()["usage"]
            assert usage["completion_tokens"] == 40
            large = {**body, "user": "x" * 3_000_000}
            assert client.post("/v1/completions", json=large).status_code == 200
            with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                lines = [line for line in stream.iter_lines() if line]
            assert lines[-1] == "data: [DONE]" and len(lines) > 30


def test_mistakes_are_found_before_the_model_is_loaded(files: Path, tmp_path: Path) -> None:
    other = trustme.CA().issue_cert("other.example.org")
    other.private_key_pem.write_to_path(tmp_path / "other.pem")
    (tmp_path / "garbage.pem").write_text("garbage")
    key, cert, both = (str(files / f"{name}.pem") for name in ("key", "cert", "both"))
    check_tls(ServerConfig())
    check_tls(ServerConfig(ssl_keyfile=key, ssl_certfile=cert, ssl_ciphers="ECDHE-RSA-AES256-GCM-SHA384"))
    check_tls(ServerConfig(ssl_keyfile=both))
    for config, flag in (
        (ServerConfig(ssl_keyfile=key), "--ssl-keyfile"),
        (ServerConfig(ssl_keyfile="/nonexistent.pem", ssl_certfile=cert), "--ssl-certfile"),
        (ServerConfig(ssl_keyfile=str(tmp_path / "other.pem"), ssl_certfile=cert), "--ssl-certfile"),
        (ServerConfig(ssl_keyfile=key, ssl_certfile=str(tmp_path / "garbage.pem")), "--ssl-certfile"),
        (ServerConfig(ssl_keyfile=both, ssl_ca_certs=str(tmp_path / "garbage.pem")), "--ssl-ca-certs"),
        (ServerConfig(ssl_keyfile=both, ssl_ciphers="nonesuch"), "--ssl-ciphers nonesuch"),
    ):
        with pytest.raises(ConfigError, match=flag):
            check_tls(config)
