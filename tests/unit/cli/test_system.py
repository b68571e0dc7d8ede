"""What `stoker up` tells the services."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker_cli.home import Endpoints, Secrets
from stoker_cli.settings import UpSettings
from stoker_cli.source import default_name, source_url
from stoker_cli.system import service_env

ENDPOINTS = Endpoints(
    gateway_url="http://127.0.0.1:8080", nats_url="nats://u:p@127.0.0.1:1", postgres_url="postgresql://x", pid=42
)


def token(cluster_secret: str) -> str:
    secrets = Secrets(nats_password="n", postgres_password="p", cluster_secret=cluster_secret)
    env = service_env(UpSettings(node="n1"), ENDPOINTS, secrets, {})
    assert env["STOKER_GATEWAY_CLUSTER_SECRET"] == cluster_secret
    return env["STOKER_STOREAGENT_CLUSTER_TOKEN"]


def test_storage_agents_of_one_home_share_a_token_that_does_not_give_the_secret_away() -> None:
    assert token("one") == token("one") != token("another")
    assert "one" not in token("one")
    assert len(token("one")) == 64


@pytest.mark.parametrize(
    ("given", "url", "name"),
    [
        ("s3://bucket/some/prefix", "s3://bucket/some/prefix", "prefix"),
        ("s3://bucket/some/prefix/", "s3://bucket/some/prefix/", "prefix"),
        ("s3://bucket", "s3://bucket", "bucket"),
        ("/models/my model", "file:///models/my%20model", "my model"),
        ("here", (Path.cwd() / "here").as_uri(), "here"),
    ],
)
def test_a_url_stays_as_it_is_and_anything_else_is_a_path(given: str, url: str, name: str) -> None:
    assert (source_url(given), default_name(url)) == (url, name)
