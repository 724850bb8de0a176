"""Programs that only people run still fit the package they measure."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks

MODULES = [m.name for m in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_is_imported(name: str) -> None:
    assert importlib.import_module(name).__doc__
