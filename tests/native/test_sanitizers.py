"""The native loader's own tests, under AddressSanitizer (with UBSan) and under ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
BIN = Path(sysconfig.get_path("scripts"))
BUILD_TIMEOUT_S = 600
RUN_TIMEOUT_S = 400


@pytest.mark.timeout(BUILD_TIMEOUT_S + RUN_TIMEOUT_S)
@pytest.mark.parametrize(
    ("sanitizer", "options"),
    [
        ("address,undefined", {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}),
        ("thread", {"TSAN_OPTIONS": "halt_on_error=1"}),
    ],
)
def test_the_native_tests_run_clean_under_the_sanitizer(sanitizer: str, options: dict[str, str]) -> None:
    # Kept between runs: only what changed is compiled again.
    build = CHECKOUT / "build" / f"sanitize-{sanitizer.replace(',', '-')}"
    environment = os.environ | options | {"PATH": f"{BIN}:{os.environ['PATH']}"}

    def run(*command: str | Path, timeout_s: float) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{command}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"

    source = CHECKOUT / "libs/checkpoint"
    configure = ("-G", "Ninja", "-DSTOKER_TESTS=ON", f"-DSTOKER_SANITIZE={sanitizer}")
    run("cmake", "-S", source, "-B", build, *configure, timeout_s=60)
    run("cmake", "--build", build, timeout_s=BUILD_TIMEOUT_S)
    at_once = ("--parallel", str(os.cpu_count() or 1))  # they wait for the disk more than they compute
    run("ctest", "--test-dir", build, *at_once, "--output-on-failure", "--no-tests=error", timeout_s=RUN_TIMEOUT_S)
