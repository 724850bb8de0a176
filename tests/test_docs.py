"""What the documents say is so: commands parse, code runs, the tree is the real one."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CLEAN_WEST, TRIGGERED_NORTH, tiny_bundle, written

from inflight_edge import Decision, InflightError, bundle, guard
from inflight_edge._strict import MAX_HEADER_BYTES
from inflight_edge.cli import _parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/paper/README.md",
)
README, ARCHITECTURE, CONTRIBUTING, CHANGELOG, SECURITY, EXPERIMENTS = ((ROOT / name).read_text() for name in DOCUMENTS)
OTHER_PROGRAMS = {
    "--plot",
    "--url",
    "--set",
    "--dataset",
    "--attack",
    "--setting",
    "--seed",
    "--data",
    "--json",
    "--table",
    "--only",
    "--resume",
    "--results",
    "--runs",
}  # of benchmarks.paper


def fences(text: str, language: str = "") -> list[str]:
    """Contents of the fenced blocks of a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for name, content in blocks if name == language]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(text: str, program: str) -> list[str]:
    """Command lines of a program in fenced blocks and in inline code."""
    lines = [line.partition("#")[0].strip() for block in fences(text) for line in block.splitlines()]
    return [line for line in [*lines, *inline_code(text)] if line.startswith(f"{program} ")]


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The real parser's sub-commands."""
    (action,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {text for action in parser._actions for text in action.option_strings} - {"-h", "--help"}


def all_documented_commands() -> list[str]:
    texts = (README, ARCHITECTURE, CONTRIBUTING, SECURITY, EXPERIMENTS, (ROOT / "docs" / "jetson.md").read_text())
    return sorted({line for text in texts for line in commands(text, "inflight-edge")})


def test_commands_are_found() -> None:
    shown = {line.split()[1] for line in all_documented_commands()}
    assert shown == set(parsers())


@pytest.mark.parametrize("line", all_documented_commands())
def test_command_line_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    assert callable(_parser().parse_args(words).run)
    given = {word for word in words if word.startswith("--")}
    assert given <= options_of(parsers()[words[0]])  # argparse would take an abbreviation


def test_every_option_named_exists_and_every_option_is_named() -> None:
    known = set().union(options_of(_parser()), *(options_of(parser) for parser in parsers().values()))
    named = {
        word for code in inline_code(README + EXPERIMENTS) for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
    }
    assert named - known <= OTHER_PROGRAMS
    assert known <= named


def test_option_table_names_the_right_commands() -> None:
    """Column two of the table is exactly the commands that have the options of column one."""
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]*) \|", README, re.MULTILINE)
    assert len(rows) >= 12
    for options, column in rows:
        everyone = set(parsers())
        if column.startswith("all"):
            claimed = everyone - {
                word for word in re.findall(r"[\w-]+", column.partition("but")[2]) if word in everyone
            }
        else:
            claimed = set(re.findall(r"[\w-]+", column))
        for option in re.findall(r"--[a-z-]+", options):
            having = {name for name, parser in parsers().items() if option in options_of(parser)}
            assert claimed == having, option


def test_benchmark_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.paper import __main__ as program

    def stop(options: argparse.Namespace) -> None:
        seen.append(options)
        raise InflightError("stopped by the test")

    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(program, "run", stop)
    monkeypatch.setattr(program, "run_table", stop)
    table, line, part = commands(EXPERIMENTS, "python -m benchmarks.paper")
    monkeypatch.setattr("sys.argv", shlex.split(table)[2:])
    assert program.main() == 2
    whole = seen.pop()
    assert (whole.table, whole.resume, whole.results) == (4, False, Path("NEW"))
    monkeypatch.setattr("sys.argv", shlex.split(line)[2:])
    assert program.main() == 2
    chosen = seen.pop()
    assert (chosen.dataset, chosen.attack, chosen.setting, chosen.only) == ("mnist", "WB", "multi", None)
    monkeypatch.setattr("sys.argv", shlex.split(part)[2:])
    assert program.main() == 2
    assert (seen[0].dataset, seen[0].attack, seen[0].only) == ("cifar10", "CB", ["unlearned"])


@pytest.mark.parametrize(
    ("pixels", "printed"),
    [(CLEAN_WEST, "use west\n"), (TRIGGERED_NORTH, "refuse trigger 0 \n")],
    ids=["clean", "triggered"],
)
def test_readme_python_runs(
    pixels: np.ndarray[Any, Any],
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    written(tmp_path / "bundle")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "frame.png")
    monkeypatch.chdir(tmp_path)
    code = fences(README, "python")[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_readme_export_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    from inflight_edge.calibration.datasets import load_images
    from inflight_edge.calibration.model import load_classifier

    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 4))
    images = np.zeros((6, 32, 32, 3), np.uint8)
    exec(
        compile(next(c for c in fences(README, "python") if "torch.export" in c), "README.md", "exec"),
        {"model": model, "images": images, "labels": np.arange(6) % 4},
    )
    data = load_images("clean.npz")
    classifier = load_classifier("classifier.pt2", image_shape=data.image_shape)
    assert (len(data), classifier.n_classes, classifier.n_features, classifier.fixed_batch) == (6, 4, 8, None)


def test_readme_margins_of_ones_own_frames_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from inflight_edge import Detector, write_bundle

    bundle, margins = tiny_bundle(), -np.arange(20, 0, -1, dtype=np.float32)
    guards = tuple(replace(guard, clean_margins=margins) for guard in bundle.guards)
    write_bundle(replace(bundle, guards=guards), tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"Detector": Detector, "margins": [-1.0 - i for i in range(30)]}
    exec(compile(next(c for c in fences(README, "python") if "clean_margins" in c), "README.md", "exec"), names)
    assert names["detector"](CLEAN_WEST).decision.value in ("accept", "trigger")
    assert names["guard"].clean_margins[0] == -30.0


def test_readme_pipeline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import ListSink, ListSource

    written(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    sink = ListSink()
    monkeypatch.setattr("inflight_edge.sources.make_source", lambda text: ListSource([CLEAN_WEST]), raising=False)
    monkeypatch.setattr("inflight_edge.sinks.make_sink", lambda text: sink, raising=False)
    names: dict[str, Any] = {}
    exec(compile(next(c for c in fences(README, "python") if "Pipeline" in c), "README.md", "exec"), names)
    assert names["status"].judged == {"list": 1}
    assert sink.decisions() == ["accept"]


def test_readme_settings_are_read(tmp_path: Path) -> None:
    from inflight_edge.settings import read_settings

    (tmp_path / "run.toml").write_text(fences(README, "toml")[0])
    settings = read_settings(tmp_path / "run.toml", {})
    assert (settings.alarm, settings.repair, settings.max_seconds) == ("3/5", True, 3600)


def test_readme_has_the_verdicts_and_the_place_for_results() -> None:
    for decision in Decision:
        assert f"| `{decision.value}` |" in README
    for name, text in (("results", README), ("verdicts", EXPERIMENTS)):
        assert re.search(rf"<!-- {name}:begin -->\n.*\| MNIST.*<!-- {name}:end -->", text, re.DOTALL)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name: str) -> None:
    document = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        found = document.parent / path if path else document
        assert found.exists(), f"{name}: {target}"
        if heading:
            assert heading in anchors(found.read_text()), f"{name}: {target}"


def anchors(text: str) -> set[str]:
    """What a link to a heading says."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_tables_are_the_records() -> None:
    from benchmarks.paper.tables import documents

    texts = documents()
    assert len(texts) == 2
    for path, text in texts.items():
        assert path.read_text() == text, f"{path.name}: run `python -m benchmarks.paper.tables`"


def source_files(*folders: str) -> set[str]:
    suffixes = {".py", ".pyx", ".pyi", ".c", ".h", ".cu", ".typed"}
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if (path.suffix in suffixes or path.name == "py.typed")
        and path.name not in ("_cpu.c", "_cuda.c", "_preprocess.c")
    }


def test_tree_is_the_real_one() -> None:
    tree = next(block for block in fences(ARCHITECTURE) if block.startswith("setup.py"))
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        path = name if name == folder else folder + name
        assert (ROOT / path).exists(), path
        assert len(line.split()) > 1, f"{path}: says nothing"
        named.add(path)
    missing = source_files("inflight_edge", "calibration", "csrc", "benchmarks") - named
    assert not missing, f"ARCHITECTURE.md does not name {sorted(missing)}"


def test_paths_named_in_contributing_exist() -> None:
    for code in inline_code(CONTRIBUTING):
        if re.fullmatch(r"[\w.]+/[\w./]*", code) and not code.startswith(".venv"):
            assert (ROOT / code.replace("NAME", "onnxruntime")).exists(), code


def test_every_dependency_has_its_reason() -> None:
    table = ARCHITECTURE.partition("## Dependencies")[2].partition("\n## ")[0].lower()
    for requirement in importlib.metadata.requires("inflight-edge") or []:
        name = re.split(r"[\[<>=;\s]", requirement)[0].lower()
        assert name == "inflight-edge" or re.search(rf"^\|.*\b{re.escape(name)}\b", table, re.MULTILINE), name


def test_changelog_names_this_version() -> None:
    assert f"## [{importlib.metadata.version('inflight-edge')}]" in CHANGELOG


def test_limits_of_the_specification() -> None:
    specification = ARCHITECTURE.partition("## The bundle")[2].partition("\n## ")[0]
    assert MAX_HEADER_BYTES == bundle.MAX_MANIFEST_BYTES
    for limit in (MAX_HEADER_BYTES, bundle.MAX_FILE_BYTES, guard.MAX_FEATURES, guard.MAX_COMPONENTS):
        assert str(limit) in specification
    assert f"format {bundle.FORMAT_VERSION}" in specification
    assert bundle.FORMAT in specification


def tracked_texts() -> dict[str, str]:
    """Text files that the project holds: from git, or all of a checkout without it."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listing.stdout.splitlines() or list(source_files("inflight_edge", "calibration", "csrc", "tests"))
    contents = {name: (ROOT / name).read_bytes() for name in {*names, *DOCUMENTS} if (ROOT / name).is_file()}
    return {name: data.decode("utf-8") for name, data in contents.items() if b"\0" not in data}


def test_no_machine_path_and_no_registry_host() -> None:
    machine = re.compile(r"(?<![\w.~*-])/(?:root|work|home|Users|mnt|scratch|opt/(?:wheels|pypi))/")
    host = re.compile(
        r"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|pypi\.nvidia\.com|[\w-]+\.local)\b(?!\()"
    )
    found = tracked_texts()
    assert len(found) > 60
    for name, text in found.items():
        for line in text.splitlines():
            assert not machine.search(line), f"{name}: {line}"
            assert not host.search(line), f"{name}: {line}"
