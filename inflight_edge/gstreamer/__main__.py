"""Print the environment in which GStreamer finds ``inflightdetect``: ``eval "$(python -m inflight_edge.gstreamer)"``."""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
from collections.abc import Mapping

from inflight_edge.gstreamer import PLUGIN_PATH

__all__ = ["environment"]


def environment(present: Mapping[str, str]) -> dict[str, str]:
    """GST_PLUGIN_PATH and PYTHONPATH with what they need put before what they hold.

    GStreamer runs a Python of its own, which knows nothing of this one's virtual environment.
    """
    package = os.path.dirname(os.path.dirname(PLUGIN_PATH))
    folders = [package, *(p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages"))]
    needed = {"GST_PLUGIN_PATH": [PLUGIN_PATH], "PYTHONPATH": folders}
    return {
        name: os.pathsep.join(dict.fromkeys([*paths, *filter(None, present.get(name, "").split(os.pathsep))]))
        for name, paths in needed.items()
    }


if __name__ == "__main__":
    for name, value in environment(os.environ).items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"# GStreamer's Python must be {sysconfig.get_python_version()} too. If it does not find the element, it has")
    print("# noted an earlier failure: rm ~/.cache/gstreamer-1.0/registry.*.bin")
