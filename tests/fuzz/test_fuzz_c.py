"""The C interface under libFuzzer with address and undefined-behaviour sanitisers, for a bounded number of runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def build(folder: Path) -> Path:
    done = subprocess.run(
        # Unoptimised it compiles in a fifth of the time.
        ["make", "-s", "-f", HERE / "Makefile", f"BUILD={folder}", "OPTIMISATION=-O0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "libclang_rt.fuzzer" in done.stderr:
        pytest.skip("clang has no fuzzer library; apt install libclang-rt-14-dev")
    assert done.returncode == 0, done.stderr
    return folder / "fuzz_inflight"


@pytest.mark.skipif(
    shutil.which("clang") is None or shutil.which("make") is None,
    reason="needs clang with libFuzzer: apt install clang",
)
def test_no_guard_frame_or_logits_break_the_c_interface(tmp_path: Path) -> None:
    program = build(tmp_path)
    done = subprocess.run(
        [program, "-runs=2500", "-seed=1", "-max_len=256", "-len_control=0", "-max_total_time=15", "-detect_leaks=0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr
