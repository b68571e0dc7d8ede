from __future__ import annotations

import stat
from pathlib import Path

import pytest

from stoker_cli import home
from stoker_cli.settings import UpSettings
from stoker_core.errors import AlreadyRunning, InvalidSettings, NotRunning, SetupFailed
from stoker_core.settings import load

ENDPOINTS = home.Endpoints(
    gateway_url="http://127.0.0.1:8080", nats_url="nats://u:p@127.0.0.1:1", postgres_url="postgresql://x", pid=42
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    home.prepare(tmp_path / "home", "node-a")
    return tmp_path / "home"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_made_once_and_kept_private(place: Path) -> None:
    first = home.load_secrets(place)
    assert home.load_secrets(place) == first
    assert len({first.nats_password, first.postgres_password, first.cluster_secret}) == 3
    assert mode(place / "secrets.json") == 0o600


def test_damaged_secrets_are_not_replaced(place: Path) -> None:
    (place / "secrets.json").write_text("{}")
    with pytest.raises(SetupFailed, match=r"secrets\.json is damaged"):
        home.load_secrets(place)
    assert (place / "secrets.json").read_text() == "{}"


def test_endpoints_come_back_and_are_private(place: Path) -> None:
    home.write_endpoints(place, ENDPOINTS)
    assert home.running_endpoints(place) == ENDPOINTS
    assert mode(home.endpoints_path(place)) == 0o600


def test_without_a_system_the_error_says_what_to_do(place: Path) -> None:
    with pytest.raises(NotRunning, match="start one with `stoker up`"):
        home.running_endpoints(place)


def test_a_second_system_in_one_home_is_told_where_the_first_is(place: Path) -> None:
    home.write_endpoints(place, ENDPOINTS)
    with (
        home.only_one(place),
        pytest.raises(AlreadyRunning, match=r"runs already, http://127\.0\.0\.1:8080 \(process 42\)"),
        home.only_one(place),
    ):
        pass
    with home.only_one(place):
        pass


def test_the_longest_socket_of_a_node_fits_below_a_home_that_is_accepted(tmp_path: Path) -> None:
    room = 107 - len(str(tmp_path)) - len("//nodes/node-a/keeper.sock")
    home.prepare(tmp_path / ("x" * room), "node-a")
    with pytest.raises(InvalidSettings, match="is too long"):
        home.prepare(tmp_path / ("x" * (room + 1)), "node-a")


def test_a_home_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="is too long"):
        home.prepare(tmp_path / ("x" * 100), "node-a")


def test_settings_of_up_come_from_the_environment() -> None:
    settings = load(
        UpSettings,
        {
            "STOKER_UP_GATEWAY_PORT": "0",
            "STOKER_UP_DEMO": "false",
            "STOKER_UP_DEMO_CACHE": "/c",
            "STOKER_UP_CPU_SLOTS": "3",
        },
    )
    assert (settings.gateway_port, settings.demo, settings.demo_cache, settings.cpu_slots) == (0, False, Path("/c"), 3)


@pytest.mark.parametrize(
    ("key", "value"), [("GATEWAY_PORT", "65536"), ("CPU_SLOTS", "0"), ("NATS_PORT", "x"), ("DEMO", "maybe")]
)
def test_a_bad_setting_of_up_is_named(key: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=f"STOKER_UP_{key}"):
        load(UpSettings, {f"STOKER_UP_{key}": value})


def test_folders_below_the_home_are_their_owners_alone_also_if_others_may_pass_through_it(tmp_path: Path) -> None:
    """As root the home lets the database's account pass; what an earlier version left open is closed."""
    (tmp_path / "home" / "logs").mkdir(parents=True, mode=0o755)
    home.prepare(tmp_path / "home", "node-a")
    assert {name: mode(tmp_path / "home" / name) for name in ("run", "logs", "nodes", "cache")} == dict.fromkeys(
        ("run", "logs", "nodes", "cache"), 0o700
    )
