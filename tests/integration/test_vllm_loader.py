"""vLLM's load format `stoker`: the same model as vLLM's own loader, from a leased pool and from one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tests.support.fake_cuda import StandInMemory, processes
from tests.support.lent import OTHER_BYTES, abandoned, lent
from tests.support.stack import DEMO_CACHE
from tests.support.tiny_model import write_safetensors, write_tiny_model
from tests.support.vllm_tokens import TOKENS, Case, Vllm

from stoker_checkpoint.open import open_checkpoint
from stoker_checkpoint.plan import CHUNK_BYTES, plan_reads
from stoker_core.errors import CorruptCheckpoint, InvalidSettings, LoadCancelled, RefusedCheckpoint

PROMPTS = ((1, 5, 6, 7), (300,), (11, 400, 12, 33, 2, 17), tuple(range(3, 60)))
WAIT_S = 60.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    with Vllm(tmp_path_factory.mktemp("vllm")) as made:
        yield made


def same_tokens(vllm: Vllm, directory: Path, *more: dict[str, int]) -> None:
    """Assert that every way to load `directory` gives the tokens that vLLM's own loader gives.

    The leased pool is overwritten as soon as `load_weights` has ended.  more: options, a case each.
    """

    def case(path: Path, load_format: str, options: dict[str, int]) -> Case:
        return Case(path=str(path), load_format=load_format, prompts=PROMPTS, options=options)

    with lent(directory) as given, given.ended_when_used_elsewhere():
        cases = [
            case(directory, "safetensors", {}),
            case(given.path, "stoker", given.options),
            *(case(directory, "stoker", options) for options in more),
        ]
        own, *ours = vllm.outcomes(cases)
    assert own.error == ""
    assert [len(tokens) for tokens in own.tokens] == [TOKENS] * len(PROMPTS)
    for outcome in ours:
        assert outcome.error == ""
        assert outcome.tokens == own.tokens
    print(f"load_weights: safetensors {own.load_ms:.0f} ms, stoker {[round(o.load_ms) for o in ours]} ms")


@pytest.mark.timeout(300)
def test_a_tiny_model_says_the_same_through_every_way_to_load_it(vllm: Vllm, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", shards=6, layers=3, dtype="float32", tokenizer=False)
    same_tokens(vllm, directory, {}, {"pool_bytes": 4 * CHUNK_BYTES})


@pytest.mark.timeout(300)
def test_tensor_parallel_ranks_share_one_read_and_slice_it(vllm: Vllm, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", hidden=128, shards=2, dtype="float32", tokenizer=False)
    with lent(directory) as given:
        one = Case(path=str(directory), load_format="safetensors", prompts=PROMPTS)
        two = Case(path=str(given.path), load_format="stoker", prompts=PROMPTS, options=given.options, ranks=2)
        own, shared = vllm.outcomes([one, two])
    assert (own.error, shared.error) == ("", "")
    assert shared.tokens == own.tokens


@pytest.mark.timeout(300)
def test_smollm2_says_the_same_as_with_vllms_own_loader(vllm: Vllm) -> None:
    # Looked for now, not at collection: in a new checkout tests/e2e, which comes before, makes it.
    made = list(DEMO_CACHE.glob("demo-*/smollm2-135m"))
    if not made:
        pytest.skip("the demo model was never made here")
    same_tokens(vllm, made[0])


def test_vllm_finds_in_a_leased_folder_what_it_finds_in_shards(directory: Path, vllm_config: Any) -> None:
    from vllm.transformers_utils.config import checkpoint_has_lm_head, get_safetensors_params_metadata

    with lent(directory) as given:
        found = get_safetensors_params_metadata(str(given.path))
        found.pop("__metadata__", None)  # vLLM takes it for one of the tensors
        assert set(found) == set(arrays())
        of_shards = get_safetensors_params_metadata(str(directory))
        assert found == {name: of_shards[name] for name in arrays()}
        assert checkpoint_has_lm_head(str(given.path)) is False


@pytest.mark.timeout(300)
def test_an_own_lm_head_counts_though_the_configuration_says_it_is_tied(vllm: Vllm, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "model", dtype="float32", tokenizer=False)
    config = json.loads((directory / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    same_tokens(vllm, directory)


def test_importing_the_plug_in_imports_neither_vllm_nor_torch() -> None:
    program = "import sys, stoker_checkpoint.vllm_loader; sys.exit(bool({'vllm', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], timeout=WAIT_S).returncode == 0


# Below: the loader itself, on modules that are no vLLM model.


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with mock.patch.dict(os.environ, environment):
        yield


@pytest.fixture
def vllm_config() -> Iterator[Any]:
    from vllm.config import VllmConfig, set_current_vllm_config

    from stoker_checkpoint.vllm_loader import register

    register()
    register()
    with set_current_vllm_config(VllmConfig()) as config:
        yield config


def loader_of(load_config: Any) -> Any:
    from vllm.model_executor.model_loader import get_model_loader

    return get_model_loader(load_config)


def load_config(options: dict[str, Any]) -> Any:
    from vllm.config.load import LoadConfig

    return LoadConfig(load_format="stoker", model_loader_extra_config=options)


def model_config(directory: Path) -> Any:
    return SimpleNamespace(model=str(directory), revision=None, quantization=None, multimodal_config=None, is_moe=False)


def keeper(names: set[str] | None = None) -> Any:
    """A module that keeps every tensor it is given, itself or sliced, and says it loaded `names` (None: all)."""
    import torch

    class Keeper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[str, torch.Tensor] = {}
            self.iterator: Any = None

        def load_weights(self, weights: Any) -> set[str]:
            self.iterator = weights
            for name, tensor in weights:
                self.kept[name] = tensor[1:, ::2] if name.startswith("sliced") else tensor
            return set(self.kept) if names is None else names

    return Keeper()


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(3)
    shapes = {"a": (300, 700), "sliced.b": (64, 64), "c.experts.0.weight": (8,), "c.experts.1.weight": (8,), "d": (5,)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    encoded = {name: ("F32", array.shape, array.tobytes()) for name, array in arrays().items()}
    write_safetensors(tmp_path / "model.safetensors", encoded)
    return tmp_path


def expected(name: str) -> np.ndarray[Any, Any]:
    array = arrays()[name]
    return array[1:, ::2] if name.startswith("sliced") else array


def test_tensors_that_a_model_keeps_stay_as_they_are_when_the_pool_is_used_for_others(
    vllm_config: Any, directory: Path
) -> None:
    model = keeper()
    with lent(directory) as given:
        loader_of(load_config(given.options)).load_weights(model, model_config(given.path))
        given.end()
        assert set(model.kept) == set(arrays())
        for name, tensor in model.kept.items():
            np.testing.assert_array_equal(tensor.numpy(), expected(name), strict=True, err_msg=name)


def test_a_load_is_reported_once_nothing_reads_from_the_lease_any_more(vllm_config: Any, directory: Path) -> None:
    from stoker_checkpoint.vllm_loader import when_loaded

    model, reported = keeper(), []
    with lent(directory) as given:

        def loaded(load_ms: float) -> None:
            reported.append(load_ms)
            given.end()

        with when_loaded(loaded):
            loader_of(load_config(given.options)).load_weights(model, model_config(given.path))
        assert len(reported) == 1
        np.testing.assert_array_equal(model.kept["a"].numpy(), expected("a"))


def test_a_pool_of_its_own_goes_with_the_load(vllm_config: Any, directory: Path) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    model = keeper()
    loader_of(load_config({})).load_weights(model, model_config(directory))  # imports and thread pools are paid
    before = held()
    loader = loader_of(load_config({}))
    loader.load_weights(model, model_config(directory))
    assert held() == before
    np.testing.assert_array_equal(model.kept["a"].numpy(), expected("a"))


def test_a_reload_needs_a_directory_with_shards_once_the_lease_was_used(vllm_config: Any, directory: Path) -> None:
    config = load_config({})
    with lent(directory) as given:
        config.model_loader_extra_config = given.options
        loader_of(config).load_weights(keeper(), model_config(given.path))
        given.end()
        with pytest.raises(CorruptCheckpoint, match="outside its 0 bytes"):
            next(loader_of(config).get_all_weights(model_config(given.path), keeper()))
        model = keeper()
        again = loader_of(config).get_all_weights(model_config(directory), model)
        model.load_weights(again)
    for name, tensor in model.kept.items():
        np.testing.assert_array_equal(tensor.numpy(), expected(name), strict=True, err_msg=name)


def test_a_reload_takes_what_is_leased_while_it_is(vllm_config: Any, directory: Path) -> None:
    model = keeper()
    with lent(directory) as given:
        given.end()  # only who reads the pool sees other bytes
        model.load_weights(loader_of(load_config(given.options)).get_all_weights(model_config(given.path), model))
    assert set(model.kept["a"].numpy().tobytes()) == set(OTHER_BYTES)


def test_weights_that_the_checkpoint_lacks_are_an_error(vllm_config: Any, directory: Path) -> None:
    import torch

    model = keeper()
    model.missing = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="missing"):
        loader_of(load_config({})).load_weights(model, model_config(directory))


@pytest.mark.parametrize("leased", [True, False])
def test_weights_that_a_model_or_a_rank_does_not_use_are_left_out(
    vllm_config: Any, directory: Path, leased: bool
) -> None:
    model = keeper()
    model.is_unused_checkpoint_weight = lambda name: name == "d"
    with lent(directory) as given:
        loader = loader_of(load_config(given.options if leased else {}))
        loader.local_expert_ids = {1}
        loader.load_weights(model, model_config(given.path if leased else directory))
    assert set(model.kept) == {"a", "sliced.b", "c.experts.1.weight"}
    np.testing.assert_array_equal(model.kept["c.experts.1.weight"].numpy(), expected("c.experts.1.weight"))


def test_further_checkpoints_of_a_model_are_read_from_their_own_directories(
    vllm_config: Any, directory: Path, tmp_path: Path
) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    tower = tmp_path / "tower"
    tower.mkdir()
    write_safetensors(tower / "model.safetensors", {"w": ("F32", (2,), np.array([1, 2], np.float32).tobytes())})
    model = keeper()
    model.secondary_weights = [DefaultModelLoader.Source(str(tower), None, prefix="tower.")]
    with lent(directory) as given:
        loader_of(load_config(given.options)).load_weights(model, model_config(given.path))
        given.end()
    assert set(model.kept) == {*arrays(), "tower.w"}
    assert model.kept["tower.w"].tolist() == [1.0, 2.0]
    np.testing.assert_array_equal(model.kept["a"].numpy(), expected("a"))


def test_files_of_a_models_own_choice_are_refused(vllm_config: Any, directory: Path) -> None:
    model = keeper()
    model.allow_patterns_overrides = ["vae/*.safetensors"]
    with pytest.raises(RefusedCheckpoint, match="vae"):
        loader_of(load_config({})).load_weights(model, model_config(directory))


@pytest.mark.parametrize(
    "options",
    [
        {"num_threads": 4},
        {"pool_bytes": -1},
        {"pool_bytes": "many"},
        {"pool_fd": 3},
        {"pool_fd": 3, "board_fd": 4, "lease_fd": 5, "pool_bytes": 1},
        {"ring_fd": 6, "ring_board_fd": 7},
        {"ring_fd": 6, "pool_fd": 3, "board_fd": 4, "lease_fd": 5},
        {"ring_board_fd": 7, "pool_fd": 3, "board_fd": 4, "lease_fd": 5},
    ],
)
def test_options_that_cannot_be_used_are_refused_by_name(vllm_config: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettings, match=next(iter(options))):
        loader_of(load_config(options))


def test_a_load_goes_on_without_its_agent_if_all_was_read(vllm_config: Any, directory: Path) -> None:
    model = keeper()
    with lent(directory) as given:
        given.agent.close()
        loader_of(load_config(given.options)).load_weights(model, model_config(given.path))
        np.testing.assert_array_equal(model.kept["a"].numpy(), expected("a"))


def test_a_load_whose_agent_dies_before_all_was_read_ends(vllm_config: Any, directory: Path) -> None:
    with abandoned(directory) as given, pytest.raises(LoadCancelled):
        loader_of(load_config(given.options)).load_weights(keeper(), model_config(given.path))


def by_ring(directory: Path) -> None:
    """Runs where libcuda is the stand-in, and its device's memory this process's own."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config

    from stoker_checkpoint import _native, device_ring
    from stoker_checkpoint.vllm_loader import register

    register()
    memory, model, devices = StandInMemory(), keeper(), []
    with lent(directory) as given, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 1)
        patch.setattr(device_ring, "CudaMemory", lambda device: (devices.append(device), memory)[1])
        ring = _native.DeviceRing(1, 3)
        board = _native.Board.open(given.board_fd)
        spans = device_ring.spans_of(plan_reads(open_checkpoint(directory)))
        feeder = _native.Feeder(ring, board, given.pool.native, spans)
        options = given.options | {"ring_fd": ring.fileno(), "ring_board_fd": feeder.board_fd}
        with set_current_vllm_config(VllmConfig()):
            loader_of(load_config(options)).load_weights(model, model_config(given.path))
        given.end()
        del feeder, ring
    memory.mark().synchronize()
    assert devices == [1]
    assert memory.lent, "they lie in the ring"
    assert set(model.kept) == set(arrays())
    for name, tensor in model.kept.items():
        np.testing.assert_array_equal(tensor.numpy(), expected(name), strict=True, err_msg=name)


@pytest.mark.timeout(120)
def test_weights_of_a_lease_with_a_ring_come_through_it_and_stay_when_it_has_ended(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with processes(tmp_path_factory.mktemp("driver")) as make:
        make()(by_ring, directory).result(WAIT_S)
