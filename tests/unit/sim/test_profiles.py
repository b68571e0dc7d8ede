"""Profiles of hardware, models and loaders."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker_core.errors import InvalidProfile
from stoker_sim.profiles import BUILT_IN, ModelProfile, load_profile

SMALL = """
[[hardware.nodes]]
name = "n"
count = 2
dram_bytes = 64_000_000_000
ssd_bytes = 500_000_000_000
ssd_bytes_per_s = 3e9
network_bytes_per_s = 1e9
remote_bytes_per_s = 1e9
[hardware.nodes.devices]
count = 1
memory_bytes = 24_000_000_000
pcie_bytes_per_s = 12e9
[[models]]
name = "m"
count = 12
weight_bytes = 2_000_000_000
kv_bytes_per_token = 1000
kv_cache_bytes = 1_000_000_000
prefill_tokens_per_s = 5000.0
decode_s_per_token = 0.01
[[loaders]]
name = "l"
remote = 0.9
peer = 0.9
ssd = 0.9
dram = 0.9
fixed_s = 0
pipelined = true
engine_start_s = 1
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_profiles_load_and_every_model_fits_the_devices_that_it_asks_for(name: str) -> None:
    profile = load_profile(name)
    for model in profile.models:
        need_bytes = (model.weight_bytes + model.kv_cache_bytes) * 1.1 / model.ranks
        assert any(
            node.devices.count >= model.ranks and node.devices.memory_bytes >= need_bytes
            for node in profile.hardware.nodes
        )
    assert list(profile.loaders_by_name) == ["safetensors", "serverlessllm", "stoker"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_loader_of_a_built_in_profile_reads_slower_than_safetensors(name: str) -> None:
    loaders = load_profile(name).loaders_by_name
    for other in ("serverlessllm", "stoker"):
        for way in ("remote", "peer", "ssd", "dram"):
            assert getattr(loaders[other], way) >= getattr(loaders["safetensors"], way)


def test_the_papers_cluster_is_as_published() -> None:
    profile = load_profile("paper")
    (node,) = profile.hardware.nodes
    assert (node.count, node.devices.count, node.devices.memory_bytes) == (4, 4, 48_000_000_000)
    assert {m.name: (m.count, m.weight_bytes) for m in profile.models} == {
        "opt-6.7b": (32, 13_300_000_000),
        "opt-13b": (16, 26_000_000_000),
        "opt-30b": (8, 60_000_000_000),
    }


def test_the_large_cluster_has_a_thousand_nodes_and_ten_thousand_models() -> None:
    profile = load_profile("thousand")
    assert (len(profile.hardware.by_name), profile.hardware.device_count) == (1000, 8000)
    assert len(profile.models_by_name) == 10_000


def test_a_file_is_read_by_its_path_and_parts_that_are_alike_get_names_that_sort(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path, SMALL))
    assert list(profile.hardware.by_name) == ["n-0", "n-1"]
    names = list(profile.models_by_name)
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("m-00", "m-11")
    assert isinstance(profile.models_by_name["m-03"], ModelProfile)
    single = load_profile(written(tmp_path, SMALL.replace("count = 12", "count = 1")))
    assert list(single.models_by_name) == ["m"]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("dram_bytes", "dram_byte", "hardware.nodes[0].dram_byte"),
        ("memory_bytes", "vram_bytes", "hardware.nodes[0].devices.vram_bytes"),
        ("weight_bytes = 2_000_000_000\n", "", "models[0].weight_bytes"),
        ("pipelined = true\n", "", "loaders[0].pipelined"),
        ("[[loaders]]", "[[loader]]", "loader"),
        ("count = 12", 'count = "12"', "models[0].count"),
        ("count = 12", "count = 0", "models[0].count"),
        ("count = 12", "count = 100_001", "models[0].count"),
        ("ssd = 0.9", "ssd = 1.1", "loaders[0].ssd"),
        ("ssd_bytes_per_s = 3e9", "ssd_bytes_per_s = -3e9", "hardware.nodes[0].ssd_bytes_per_s"),
        ("ssd_bytes_per_s = 3e9", "ssd_bytes_per_s = 3.0", "hardware.nodes[0].ssd_bytes_per_s"),
        ("ssd_bytes_per_s = 3e9", "ssd_bytes_per_s = inf", "hardware.nodes[0].ssd_bytes_per_s"),
        ("ssd_bytes_per_s = 3e9", "ssd_bytes_per_s = nan", "hardware.nodes[0].ssd_bytes_per_s"),
        ("fixed_s = 0", "fixed_s = nan", "loaders[0].fixed_s"),
        ("pcie_bytes_per_s = 12e9", 'pcie_bytes_per_s = 12e9\nkind = "tpu"', "hardware.nodes[0].devices.kind"),
        ('name = "m"', 'name = "../m"', "models[0].name"),
        ("kv_bytes_per_token = 1000", "kv_bytes_per_token = 1000000", "models[0].kv_cache_bytes"),
        ("[[models]]", SMALL[SMALL.index("[[models]]") : SMALL.index("[[loaders]]")] + "[[models]]", "models[1].name"),
        ("[[loaders]]", SMALL[SMALL.index("[[loaders]]") :] + "[[loaders]]", "loaders[1].name"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_with_its_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    assert old in SMALL
    path = written(tmp_path, SMALL.replace(old, new, 1))
    with pytest.raises(InvalidProfile) as caught:
        load_profile(path)
    assert (caught.value.path, caught.value.key) == (path, key)
    assert key in str(caught.value)


def test_the_totals_are_bounded(tmp_path: Path) -> None:
    model = SMALL[SMALL.index("[[models]]") : SMALL.index("[[loaders]]")].replace("count = 12", "count = 60_000")
    text = SMALL.replace("[[loaders]]", model.replace('"m"', '"b"') + model.replace('"m"', '"c"') + "[[loaders]]")
    with pytest.raises(InvalidProfile, match="120,012"):
        load_profile(written(tmp_path, text))


@pytest.mark.parametrize("text", ["= 5", "a = [", "\x00"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InvalidProfile, match="TOML") as caught:
        load_profile(path)
    assert caught.value.path == path


def test_what_is_neither_built_in_nor_a_file_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InvalidProfile, match="paper, h100, thousand"):
        load_profile("papre")
    with pytest.raises(InvalidProfile, match="No such file"):
        load_profile(str(tmp_path / "missing.toml"))
