"""Files that are no program, damaged programs and hostile pickles are refused in one line, and run no code."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks_for_tests import FlatMLP, LeNetBN, export, saved, shaken

from inflight_edge.calibration.model import load_program
from inflight_edge.errors import ModelError


@functools.cache
def program() -> Any:
    return export(shaken(FlatMLP()), torch.zeros(2, 512), free={0: "batch"})


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "nope.pt2"
    with pytest.raises(ModelError, match=rf"^{path}: no such file; expected a torch\.export program"):
        load_program(path)
    with pytest.raises(ModelError, match=rf"^{tmp_path}: .*torch\.export program"):
        load_program(tmp_path)


@pytest.mark.parametrize("content", ["empty", "text", "half", "tail"])
def test_file_that_is_no_program(tmp_path: Path, content: str) -> None:
    whole = saved(program(), tmp_path / "whole.pt2").read_bytes()
    data = {"empty": b"", "text": b"weights\n", "half": whole[: len(whole) // 2], "tail": whole[:-20]}[content]
    path = tmp_path / "model.pt2"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=rf"^{path}: not a (readable )?torch\.export program.*; export the model"):
        load_program(path)


def test_state_dict_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt2"
    torch.save(FlatMLP().state_dict(), path)
    with pytest.raises(ModelError, match=rf"^{path}: not a readable torch\.export program"):
        load_program(path)


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("part", "use_pickle"),
    [("sample_inputs/model.pt", "false"), ("weights/weight_0", "false"), ("weights/weight_0", "true")],
)
@pytest.mark.parametrize("before", [None, "0"])
def test_pickles_in_a_program_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, use_pickle: str, before: str | None
) -> None:
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    payload = io.BytesIO()
    torch.save(Malice(tmp_path / "owned"), payload)
    good, bad = saved(program(), tmp_path / "good.pt2"), tmp_path / "bad.pt2"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_STORED) as target:
        for member in source.namelist():
            data = source.read(member)
            if member.endswith("model_weights_config.json"):
                assert data.count(b'"use_pickle": false') > 0
                data = data.replace(b'"use_pickle": false', b'"use_pickle": %s' % use_pickle.encode())
            target.writestr(member, payload.getvalue() if member.endswith(part) else data)
    with pytest.raises(ModelError, match=rf"^{bad}: not a readable torch\.export program"):
        load_program(bad)
    assert not (tmp_path / "owned").exists()
    assert os.environ.get(name) == before
    torch.load(io.BytesIO(payload.getvalue()), weights_only=False)
    assert (tmp_path / "owned").exists()  # the payload is a real one


@pytest.mark.parametrize(
    ("member", "old", "new"),
    [
        ("model_weights_config.json", b'"use_pickle"', b'"use_pickl_"'),
        ("model_weights_config.json", b'"hidden.weight"', b'"hidden.weighx"'),
        ("model_constants_config.json", b'"config"', b'"confix"'),
    ],
)
def test_damaged_program(tmp_path: Path, member: str, old: bytes, new: bytes) -> None:
    good, bad = saved(program(), tmp_path / "good.pt2"), tmp_path / "bad.pt2"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(member):
                assert old in data
                data = data.replace(old, new)
            target.writestr(name, data)
    with pytest.raises(ModelError, match=rf"^{bad}: not a readable torch\.export program \(.*\); export the model"):
        load_program(bad)


def test_torch_adds_no_traceback_to_the_one_line(tmp_path: Path) -> None:
    """In a process of its own, where torch's loggers write to the true standard error."""
    torch.save(LeNetBN().state_dict(), tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", a=1)
    (tmp_path / "text.pt").write_text("x")
    names = ("model.pt", "model.npz", "text.pt")
    code = (
        "import sys\nfrom inflight_edge.cli import main\n"
        "assert [main(['inspect', path, '--data', 'x']) for path in sys.argv[1:]] == [2, 2, 2]"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 3, result.stderr
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"inflight-edge: error: {name}: not a ")
