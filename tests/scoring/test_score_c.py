"""The C scorer by itself: memory errors, undefined behaviour, allocations, the symbols it needs, its header in C++."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from inflight_edge.guard import MAX_COMPONENTS, MAX_FEATURES

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]

needs_gcc = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("make") is None, reason="needs gcc and make to compile csrc"
)


def run(*command: str | Path, timeout: float = 120.0) -> str:
    """Standard output; the assertion shows everything the command printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_library(folder: Path, cflags: str, name: str = "libinflight.a") -> Path:
    """The library by its own Makefile, every instruction set of this machine in it."""
    run("make", "-s", "-f", CSRC / "Makefile", f"BUILD={folder}", f"CFLAGS={cflags}", "CC=gcc", folder / name)
    return folder / name


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is shipped, but with every warning an error and without calls into the stack protector."""
    flags = "-O3 -Werror -fno-stack-protector -fcallgraph-info=su"  # the last writes beside each object what it calls
    return build_library(tmp_path_factory.mktemp("library"), flags)


def compile_sanitised(folder: Path, *flags: str, source: str = "score_main.c") -> Path:
    return compile_main(folder, build_library(folder, " ".join(("-Werror", *flags))), *flags, source=source)


def compile_main(folder: Path, library: Path, *flags: str, source: str = "score_main.c") -> Path:
    x86 = ["-DIFE_X86"] if platform.machine() == "x86_64" else []
    run(
        "gcc",
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        *x86,
        *flags,
        f"-I{CSRC}",
        HERE / source,
        library,
        "-o",
        folder / "main",
        "-lm",
    )
    return folder / "main"


def sanitised_runner(folder: Path, flags: str) -> list[str]:
    """What a program with this sanitiser is started by; skips where gcc cannot link it, or it cannot run.

    Some kernels spread the memory further than ThreadSanitizer of gcc 12 can map; a fixed layout helps, where allowed.
    """
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    program = str(folder / "probe")
    linked = subprocess.run(["gcc", flags, probe, "-o", program], capture_output=True, check=False)
    if linked.returncode:
        pytest.skip(f"gcc has no library for {flags}")
    for runner in ([], ["setarch", "--addr-no-randomize"]):
        if (not runner or shutil.which(runner[0])) and not subprocess.run([*runner, program], check=False).returncode:
            return runner
    pytest.skip(f"a program with {flags} cannot run here")


@needs_gcc
@pytest.mark.parametrize("optimisation", ["-O0", *(pytest.param(o, marks=pytest.mark.slow) for o in ("-O1", "-O3"))])
def test_sanitisers_find_nothing(tmp_path: Path, optimisation: str) -> None:
    sanitisers = "-fsanitize=address,undefined,float-cast-overflow"
    sanitised_runner(tmp_path, sanitisers)
    main = compile_sanitised(tmp_path, optimisation, "-g", sanitisers, "-fno-sanitize-recover=all")
    # LeakSanitizer cannot run under a tracer, as containers and debuggers may be.
    assert run("env", "ASAN_OPTIONS=detect_leaks=0", main) == ""


@needs_gcc
def test_threads_share_a_guard_without_a_race(tmp_path: Path) -> None:
    """ThreadSanitizer, on every instruction set of this machine."""
    runner = sanitised_runner(tmp_path, "-fsanitize=thread")
    main = compile_sanitised(tmp_path, "-O0", "-g", "-fsanitize=thread", "-pthread", source="score_threads.c")
    assert run(*runner, main) == ""


@needs_gcc
def test_score_does_not_allocate(tmp_path: Path, library: Path) -> None:
    wrapped = ["-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=aligned_alloc", "-DCOUNT_ALLOCATIONS"]
    assert run(compile_main(tmp_path, library, "-O3", *wrapped)) == ""


@needs_gcc
def test_scorer_needs_arithmetic_only(library: Path) -> None:
    """No heap, lock, file or process function among what the kernels leave to the linker."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm to list symbols")
    kernels = sorted(library.parent.glob("score_*.o"))
    assert len(kernels) >= 2
    for path in kernels:
        listing = run("nm", "-u", path).split()
        assert set(listing) - {"U", "_GLOBAL_OFFSET_TABLE_"} <= {"expf", "log", "logf", "memcpy", "memset"}, path.name


@needs_gcc
def test_no_warning_from_strict_conversions() -> None:
    for path in (CSRC / "score.c", CSRC / "score_portable.c"):
        run("gcc", *WARNINGS, "-fsyntax-only", path)


@needs_gcc
def test_library_is_usable_from_cpp(tmp_path: Path, library: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the header as C++")
    source = tmp_path / "user.cpp"
    source.write_text(
        '#include "inflight.h"\n'
        "int main() {\n"
        "    ife_scorer *scorer = nullptr;\n"
        "    return ife_scorer_create(nullptr, nullptr, 0, nullptr, &scorer) == IFE_INVALID ? 0 : 1;\n"
        "}\n"
    )
    run("g++", "-Wall", "-Werror", f"-I{CSRC}", source, library, "-o", tmp_path / "user", "-lm")
    run(tmp_path / "user")


def test_limits_are_the_same_in_c_and_python() -> None:
    header = (CSRC / "inflight.h").read_text()
    for name, limit in (("IFE_MAX_FEATURES", MAX_FEATURES), ("IFE_MAX_COMPONENTS", MAX_COMPONENTS)):
        match = re.search(rf"#define {name} (\d+)", header)
        assert match is not None
        assert int(match.group(1)) == limit


@needs_gcc
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc/self/statm to see memory grow")
@pytest.mark.parametrize("n_frames", [20_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow(tmp_path: Path, library: Path, n_frames: int) -> None:
    """Judged and scored, each frame under a guard of each kind; one page more is a failure."""
    main = tmp_path / "endurance"
    run("gcc", "-std=c11", "-O2", *WARNINGS[1:3], f"-I{CSRC}", HERE / "endurance_main.c", library, "-o", main, "-lm")
    assert run(main, str(n_frames), timeout=900.0).count(" grown 0 pages, 0 wrong") == 3


@needs_gcc
def test_a_call_takes_no_more_stack_than_the_header_says(library: Path) -> None:
    """By gcc's own account: the deepest chain of calls, where a verdict calls the scorer of an instruction set."""
    sizes: dict[str, int] = {}
    calls: dict[str, set[str]] = {}
    for file in library.parent.glob("*.ci"):
        text = file.read_text()
        for title, size in re.findall(r'node: \{ title: "([^"]+)" label: "[^"]*?(\d+) bytes', text):
            sizes[title] = int(size)
        for source, target in re.findall(r'edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"', text):
            calls.setdefault(source, set()).add(target)

    def deepest(function: str) -> int:
        return sizes.get(function, 0) + max((deepest(target) for target in calls.get(function, ())), default=0)

    assert {"ife_judge", "ife_score"} <= sizes.keys()
    kernels = [name for name in sizes if re.fullmatch(r".*:score(_best|_block)?\w*", name)]
    assert len(kernels) >= 6
    limit = re.search(r"a call takes up to (\d+) KiB", (CSRC / "inflight.h").read_text())
    assert limit is not None
    used = max(deepest("ife_judge"), deepest("ife_score")) + max(map(deepest, kernels))
    assert 0.8 * int(limit[1]) * 1024 < used <= int(limit[1]) * 1024
