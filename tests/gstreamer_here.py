"""GStreamer for Python as tests need it: found where the system keeps it, or the reason why it is not there."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

# Where Debian and Ubuntu install PyGObject for their own Python.
_SYSTEM = Path("/usr/lib/python3/dist-packages/gi")


@functools.cache
def _find() -> str:
    """The folder that PYTHONPATH needs, "" when none is, for `import gi`.  Raises ImportError.

    A virtual environment made with --system-site-packages has it.  Any other one of the same Python version can use
    it too: it is put on the path alone, so that nothing else of the system comes along.
    """
    try:
        importlib.import_module("gi")
    except ImportError:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if not (_SYSTEM / f"_gi{suffix}").exists():
            raise
        folder = tempfile.mkdtemp(prefix="gi-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.symlink(_SYSTEM, Path(folder, "gi"))
        sys.path.append(folder)
        importlib.invalidate_caches()
        importlib.import_module("gi")
        return folder
    return ""


def missing(elements: Sequence[str] = (), typelibs: Sequence[str] = ()) -> str:
    """Why a test cannot run here, or "".  See system-packages.txt for what has to be installed."""
    try:
        _find()
        import gi

        for name in ("Gst", "GstBase", "GstApp", "GstVideo", *typelibs):
            gi.require_version(name, "1.0")
        from gi.repository import Gst
    except (ImportError, ValueError) as error:
        return f"GStreamer for Python: {error}"
    if importlib.util.find_spec("gi.overrides._gi_gst") is None:
        return "python3-gst-1.0 is not installed"
    Gst.init(None)
    for element in elements:
        if Gst.ElementFactory.find(element) is None:
            return f"GStreamer has no element {element}"
    return ""


def need(*elements: str, typelibs: Sequence[str] = ()) -> None:
    """Skip the test, or the whole file when called at its top, where GStreamer or an element of it is missing."""
    if reason := missing(elements, typelibs):
        pytest.skip(f"{reason}; tests/system-packages.txt says what to install", allow_module_level=True)


def environment(**more: str) -> dict[str, str]:
    """Environment of another process that needs this one's packages and gi."""
    from inflight_edge.gstreamer.__main__ import environment as of_the_element

    present = {**os.environ, "PYTHONPATH": _find()}
    return {**os.environ, **of_the_element(present), **more}
