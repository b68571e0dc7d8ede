from pathlib import Path

import pytest

from stoker_core.errors import InvalidSettings
from stoker_core.settings import load
from stoker_storeagent.settings import StoreagentSettings


def test_a_node_has_its_own_directory_under_home() -> None:
    settings = load(StoreagentSettings, {"STOKER_HOME": "/h", "STOKER_NODE": "n1"})
    assert settings.socket_path == Path("/h/nodes/n1/store.sock")
    assert settings.ssd_path == Path("/h/nodes/n1/ssd")
    assert settings.keeper_path == Path("/h/nodes/n1/keeper.sock")
    assert settings.allowed_root_paths == (Path("/"),)


def test_directory_sockets_and_roots_may_be_set() -> None:
    settings = load(
        StoreagentSettings,
        {
            "STOKER_STOREAGENT_SSD_DIR": "/fast",
            "STOKER_STOREAGENT_SOCKET": "/run/s.sock",
            "STOKER_STOREAGENT_KEEPER_SOCKET": "/run/k.sock",
            "STOKER_STOREAGENT_ALLOWED_ROOTS": "/models:/more",
        },
    )
    assert settings.ssd_path == Path("/fast")
    assert settings.socket_path == Path("/run/s.sock")
    assert settings.keeper_path == Path("/run/k.sock")
    assert settings.allowed_root_paths == (Path("/models"), Path("/more"))


def test_a_socket_path_that_is_too_long_is_refused_with_a_hint() -> None:
    settings = load(StoreagentSettings, {"STOKER_HOME": "/" + "h" * 100, "STOKER_NODE": "n1"})
    with pytest.raises(InvalidSettings, match="STOKER_STOREAGENT_SOCKET or a shorter STOKER_HOME"):
        _ = settings.socket_path


@pytest.mark.parametrize("roots", ["", ":", "models", "/a:b"])
def test_roots_must_be_absolute(roots: str) -> None:
    settings = load(StoreagentSettings, {"STOKER_STOREAGENT_ALLOWED_ROOTS": roots})
    with pytest.raises(InvalidSettings, match="ALLOWED_ROOTS"):
        _ = settings.allowed_root_paths


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("STOKER_STOREAGENT_COPIES_AT_ONCE", "1"),
        ("STOKER_STOREAGENT_FETCHES_AT_ONCE", "0"),
        ("STOKER_STOREAGENT_LEASES_MAX", "-1"),
        ("STOKER_STOREAGENT_SSD_THREADS", "0"),
        ("STOKER_STOREAGENT_SCRUB_BYTES_PER_S", "-1"),
        ("STOKER_STOREAGENT_NETWORK_BYTES_PER_S", "-1"),
        ("STOKER_STOREAGENT_CLUSTER_TOKEN", "short"),
        ("STOKER_STOREAGENT_PEER_PORT", "65536"),
        ("STOKER_STOREAGENT_PEERS_MAX", "0"),
        ("STOKER_STOREAGENT_S3_ANONYMOUS", "perhaps"),
        ("STOKER_STOREAGENT_METRIC_SAMPLE_S", "0"),
        ("STOKER_STOREAGENT_SSD_CAPACITY_BYTES", "much"),
        ("STOKER_STOREAGENT_SSD_CAPACTY_BYTES", "1"),
        ("STOKER_STOREAGENT_POOL_HUGE", "large"),
        ("STOKER_STOREAGENT_POOL_LOCK", "perhaps"),
        ("STOKER_STOREAGENT_POOL_FAULT_THREADS", "0"),
        ("STOKER_STOREAGENT_POOL_WAIT_S", "-1"),
        ("STOKER_STOREAGENT_READER", "aio"),
    ],
)
def test_a_value_or_key_that_cannot_be_used_is_named(key: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=key):
        load(StoreagentSettings, {key: value})
