"""The C scorer by itself: memory errors, undefined behaviour, allocations, the symbols it needs, its header in C++."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from inflight_edge.guard import MAX_FEATURES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to compile csrc")


def run(*command: str | Path) -> str:
    """Standard output; the assertion shows everything the command printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_main(target: Path, *flags: str) -> None:
    sources = [HERE / "score_main.c", CSRC / "score_cpu.c"]
    run("gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", *flags, f"-I{CSRC}", *sources, "-o", target, "-lm")


@needs_gcc
@pytest.mark.parametrize("optimisation", ["-O1", "-O3"])
def test_sanitisers_find_nothing(tmp_path: Path, optimisation: str) -> None:
    sanitisers = "-fsanitize=address,undefined"
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    linked = subprocess.run(["gcc", sanitisers, probe, "-o", tmp_path / "probe"], capture_output=True, check=False)
    if linked.returncode:
        pytest.skip("gcc has no address and undefined-behaviour sanitiser libraries")
    compile_main(tmp_path / "main", optimisation, "-g", sanitisers, "-fno-sanitize-recover=all")
    # LeakSanitizer cannot run under a tracer, as containers and debuggers may be.
    assert run("env", "ASAN_OPTIONS=detect_leaks=0", tmp_path / "main") == ""


@needs_gcc
def test_score_does_not_allocate(tmp_path: Path) -> None:
    wrapped = ["-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc", "-DCOUNT_ALLOCATIONS"]
    compile_main(tmp_path / "main", "-O3", *wrapped)
    assert run(tmp_path / "main") == ""


@needs_gcc
def test_scorer_needs_arithmetic_only(tmp_path: Path) -> None:
    """No heap, lock, file or process function among what the object file leaves to the linker."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm to list symbols")
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-stack-protector"]
    run("gcc", *WARNINGS, *flags, "-c", CSRC / "score_cpu.c", "-o", tmp_path / "score_cpu.o")
    listing = run("nm", "-u", tmp_path / "score_cpu.o").split()
    assert set(listing) - {"U", "_GLOBAL_OFFSET_TABLE_"} <= {"expf", "logf", "memcpy", "memset"}


@needs_gcc
def test_header_compiles_as_cpp(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the header as C++")
    source = tmp_path / "user.cpp"
    source.write_text('#include "inflight.h"\nint main() { return ife_guard_check(nullptr) == IFE_INVALID ? 0 : 1; }\n')
    run("gcc", *WARNINGS, "-c", CSRC / "score_cpu.c", "-o", tmp_path / "score_cpu.o")
    run("g++", "-Wall", "-Werror", f"-I{CSRC}", source, tmp_path / "score_cpu.o", "-o", tmp_path / "user", "-lm")
    run(tmp_path / "user")


def test_limits_are_the_same_in_c_and_python() -> None:
    match = re.search(r"#define IFE_MAX_FEATURES (\d+)", (CSRC / "inflight.h").read_text())
    assert match is not None
    assert int(match.group(1)) == MAX_FEATURES
