"""What nvcc makes of the CUDA scorer: each target compiles, within a budget of registers and shared memory."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from cuda_cases import CSRC, compile_checked

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile for a GPU")
FLAGS = ["-std=c++17", "-O3", f"-I{CSRC}"]
# Registers: 65536 / (256 threads x 64) = 4 blocks of a multiprocessor at least, 6 for 40.
# Static shared bytes: one chunk of values, the warps' partial results, the ticket; the taps of a tile.
BUDGETS = {"score": (64, 2048), "preprocess": (40, 512)}
jobs = pytest.mark.parametrize("job", BUDGETS)


def resources(report: str) -> tuple[int, int]:
    """Registers and static shared bytes of the one kernel in ptxas' report; fails on a spill or a stack frame."""
    assert len(re.findall(r"Compiling entry function", report)) == 1, report
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    used = re.search(r"Used (\d+) registers.*?(\d+) bytes smem", report)
    assert used is not None, report
    return int(used.group(1)), int(used.group(2))


@jobs
@pytest.mark.parametrize("architecture", ["sm_87", "sm_110", "sm_90"])
def test_cubin_stays_in_its_budget(tmp_path: Path, architecture: str, job: str) -> None:
    if architecture not in compile_checked("nvcc", "--list-gpu-code").split():
        pytest.skip(f"this nvcc does not know {architecture}")
    source, target = CSRC / f"{job}_cuda.cu", tmp_path / f"{job}.cubin"
    report = compile_checked("nvcc", *FLAGS, source, "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", target)
    registers, shared = resources(report)
    assert registers <= BUDGETS[job][0]
    assert shared <= BUDGETS[job][1]
    assert target.read_bytes()[:4] == b"\x7fELF"


@jobs
def test_portable_ptx(tmp_path: Path, job: str) -> None:
    """For GPUs without a cubin of their own; no division but the IEEE one, and denormals are kept."""
    target = tmp_path / f"{job}.ptx"
    compile_checked("nvcc", *FLAGS, CSRC / f"{job}_cuda.cu", "-ptx", "-arch=compute_80", "-o", target)
    ptx = target.read_text()
    assert ".target sm_80" in ptx
    assert "rcp.rn.f32" in ptx or job != "score"
    for inexact in ("div.approx", "div.full", "rcp.approx", "fma.rn.ftz", "mul.ftz", "add.ftz"):
        assert inexact not in ptx


def test_spills_fail_the_budget() -> None:
    """The check itself, on what ptxas prints for a kernel that spills."""
    report = (
        "ptxas info    : Compiling entry function 'kernel' for 'sm_87'\n"
        "    8 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 16 registers, used 1 barriers, 1160 bytes smem, 432 bytes cmem[0]\n"
    )
    with pytest.raises(AssertionError, match="8 bytes spill"):
        resources(report)
    assert resources(report.replace(" 8 bytes s", " 0 bytes s")) == (16, 1160)
