"""Settings from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker_core.errors import InvalidSettings
from stoker_core.settings import SCOPES, SharedSettings, known_keys, load, masked


class WorkerLike(SharedSettings, frozen=True):
    SCOPE = "worker"
    cpu_slots: int = 2
    ratio: float = 0.5
    eager: bool = True
    cache: Path = Path("/var/cache")
    api_key: str = ""
    peer_url: str = ""
    limit: int | None = None


def test_values_come_from_the_environment_with_their_types() -> None:
    settings = load(
        WorkerLike,
        {
            "STOKER_NODE": "node-7",
            "STOKER_HOME": "/srv/stoker",
            "STOKER_WORKER_CPU_SLOTS": "4",
            "STOKER_WORKER_RATIO": "0.25",
            "STOKER_WORKER_EAGER": "false",
            "STOKER_WORKER_LIMIT": "9",
            "PATH": "/usr/bin",
        },
    )
    assert (settings.node, settings.home) == ("node-7", Path("/srv/stoker"))
    assert (settings.cpu_slots, settings.ratio, settings.eager, settings.limit) == (4, 0.25, False, 9)


def test_paths_are_made_absolute() -> None:
    settings = load(WorkerLike, {"STOKER_HOME": "~/here", "STOKER_WORKER_CACHE": "there"})
    assert settings.home == Path.home() / "here"
    assert settings.cache == Path.cwd() / "there"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        load(WorkerLike, {}).cpu_slots = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("STOKER_WORKER_CPU_SLOT", "STOKER_WORKER_CPU_SLOTS"),
        ("STOKER_NATSURL", "STOKER_NATS_URL"),
        ("STOKER_CPU_SLOTS", "STOKER_WORKER_CPU_SLOTS"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(key: str, suggestion: str) -> None:
    with pytest.raises(InvalidSettings, match=f"unknown setting {key}; did you mean {suggestion}\\?"):
        load(WorkerLike, {key: "1"})


def test_an_unknown_key_like_no_other_is_refused_too() -> None:
    with pytest.raises(InvalidSettings, match=r"unknown setting STOKER_XYZZY$"):
        load(WorkerLike, {"STOKER_XYZZY": "1"})


def test_keys_of_other_scopes_are_left_to_their_owners() -> None:
    others = {f"STOKER_{scope.upper()}_WHATEVER": "1" for scope in SCOPES if scope != "worker"}
    assert load(WorkerLike, others) == load(WorkerLike, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("STOKER_WORKER_CPU_SLOTS", "two"),
        ("STOKER_WORKER_CPU_SLOTS", "2.5"),
        ("STOKER_WORKER_EAGER", "perhaps"),
        ("STOKER_DRAIN_S", "soon"),
        ("STOKER_NODE", "Node.7"),
        ("STOKER_NODE", ""),
        ("STOKER_NODE", "x" * 64),
        ("STOKER_NODE", "a>b"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_and_its_key_named(key: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=key):
        load(WorkerLike, {key: value})


def test_the_default_node_name_is_one_subject_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("Host_1.example.org", "x" * 200, "...", "a b"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert "." not in load(WorkerLike, {}).node


def test_secrets_are_hidden_where_settings_are_shown() -> None:
    settings = load(
        WorkerLike,
        {
            "STOKER_NATS_URL": "nats://stoker:hunter2@127.0.0.1:4222",
            "STOKER_POSTGRES_URL": "postgresql://stoker:hunter2@127.0.0.1:5432/stoker",
            "STOKER_WORKER_PEER_URL": "https://example.org/path",
            "STOKER_WORKER_API_KEY": "hunter2",
        },
    )
    shown = masked(settings)
    assert "hunter2" not in str(shown)
    assert shown["STOKER_NATS_URL"] == "nats://stoker:***@127.0.0.1:4222"
    assert shown["STOKER_POSTGRES_URL"] == "postgresql://stoker:***@127.0.0.1:5432/stoker"
    assert shown["STOKER_WORKER_PEER_URL"] == "https://example.org/path"
    assert shown["STOKER_WORKER_API_KEY"] == "***"
    assert shown["STOKER_WORKER_CPU_SLOTS"] == "2"
    assert set(shown) == set(known_keys(WorkerLike))


def test_a_secret_that_is_not_set_is_shown_as_empty() -> None:
    assert masked(load(WorkerLike, {}))["STOKER_WORKER_API_KEY"] == ""


def test_a_refusal_does_not_repeat_a_secret() -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(WorkerLike, {"STOKER_WORKER_API_KEYS": "hunter2"})
    assert "hunter2" not in caught.value.message
