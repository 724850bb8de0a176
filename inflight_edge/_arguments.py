"""Arguments that commands share, and what the text of an argument means."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from inflight_edge.errors import OptionError

__all__ = [
    "check_file",
    "check_parent",
    "class_index",
    "engine_arguments",
    "key_argument",
    "model_arguments",
    "number",
    "numbers",
    "plan",
    "precisions",
    "run_arguments",
    "seed",
]


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `inspect` and `calibrate` take."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="torch.export program (.pt2)")
    parser.add_argument(
        "--data", type=Path, required=True, help="clean images: folder with a sub-folder per class, or .npz"
    )
    parser.add_argument("--scale", type=number, help="multiplies the 8-bit pixel (default 1/255)")
    parser.add_argument(
        "--mean", type=numbers, help="subtracted then: one number, or one per channel separated by commas"
    )
    parser.add_argument("--std", type=numbers, help="divides then: one number, or one per channel separated by commas")
    parser.add_argument(
        "--target", action="append", metavar="CLASS", help="class index or name taken as the target; repeatable"
    )
    parser.add_argument(
        "--feature-layer", metavar="NAME", help="graph node or module; several joined by +; `penultimate`"
    )
    parser.add_argument(
        "--method",
        choices=("auto", "neural-cleanse", "perturbation"),
        help="patterns looked for: patches, additions, or both (default auto)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps of a search for a patch at most (default 400)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes: names are those of settings.Settings, which has the defaults."""
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE")
    parser.add_argument("--source", action="append", metavar="URI", help="a camera or file; repeatable")
    parser.add_argument("--sink", action="append", metavar="URI", help="where outcomes go; repeatable")
    parser.add_argument("--web", metavar="HOST:PORT", help="live page, such as 127.0.0.1:8080")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with these settings; options win")
    parser.add_argument("--max-frames", type=int, metavar="N", help="stop after N frames")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="stop after S seconds")
    parser.add_argument(
        "--keep", help="of frames that come too fast: newest (default of cameras), oldest, or all (of files)"
    )
    parser.add_argument("--queue", type=int, metavar="N", help="frames that may wait per source (default 4)")
    parser.add_argument("--sink-queue", type=int, metavar="N", help="outcomes that may wait per sink (default 256)")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="frames per call of the engine (default: one per source)"
    )
    parser.add_argument("--repair", action="store_true", default=None, help="label a trigger with its source class")
    parser.add_argument("--alarm", metavar="N/M", help="alarm while N of a camera's last M frames are flagged")
    parser.add_argument("--alpha", type=float, help="promised rate of false alarms; default: the rule without one")
    parser.add_argument("--region", metavar="X,Y,W,H", help="judge this part of each frame")
    parser.add_argument(
        "--cpus", action="append", metavar="ROLE=LIST", help="processors of capture, inference or sinks; repeatable"
    )
    parser.add_argument("--log-format", help="text (default) or json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary to FILE")
    engine_arguments(parser)
    # What is not given here may stand in the file.
    names = ("engine", "precision", "scorer", "no_arena", "optimisation", "memory", "wait", "no_graph")
    parser.set_defaults(**dict.fromkeys(names))


def check_parent(option: str, path: Path) -> None:
    """Refuse an output path that cannot be written, before the long work and not after it.  Raises OptionError."""
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"{option}: {folder} is no folder that can be written to; make it or name another")


def check_file(option: str, path: Path, *, bundle: str | os.PathLike[str] | None = None) -> None:
    """The same of an output file, which may not lie in the ``bundle`` that it tells of either: that holds its own alone."""
    if not path.exists():
        check_parent(option, path)
    elif path.is_dir() or not os.access(path, os.W_OK):
        raise OptionError(f"{option}: expected a file that can be written, {path} is none; name another")
    if bundle is not None and os.path.realpath(path.absolute().parent) == os.path.realpath(bundle):
        raise OptionError(
            f"{option}: {path} lies in the bundle, which no reader would take any more; name another file"
        )


def key_argument(parser: argparse.ArgumentParser) -> None:
    """The owner's key, for commands that read a bundle."""
    parser.add_argument("--key", type=Path, metavar="PUBLIC.pem", help="refuse a bundle that this key did not sign")


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    """How a detector runs, for commands that make one."""
    key_argument(parser)
    parser.add_argument("--engine", choices=("onnxruntime", "openvino", "tensorrt"), default="onnxruntime")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32", help="default %(default)s")
    parser.add_argument("--scorer", choices=("auto", "cpu", "cuda", "triton", "reference"), default="auto")
    parser.add_argument("--threads", type=int, help="threads of the engine")
    parser.add_argument("--no-arena", action="store_true", help="onnxruntime: keep no memory between frames")
    parser.add_argument(
        "--optimisation", choices=("all", "extended", "basic", "off"), default="all", help="onnxruntime: of the graph"
    )
    parser.add_argument("--memory", choices=("auto", "mapped", "copied"), default="auto", help="tensorrt: of buffers")
    parser.add_argument("--wait", choices=("blocking", "spin"), default="blocking", help="tensorrt: for the GPU")
    parser.add_argument("--no-graph", action="store_true", help="tensorrt: no CUDA graph")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="tensorrt: what `compile --out` wrote")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def seed(text: str) -> int:
    """A seed: an integer from 0 to 2**31 - 1."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {2**31 - 1}, got {text!r}")
    return int(text)


def plan(text: str) -> tuple[str, str]:
    """A compute capability and a plan's file, CC=FILE."""
    capability, equals, path = text.partition("=")
    if not (capability and equals and path):
        raise argparse.ArgumentTypeError(f"expected CC=FILE such as 8.7=a.plan, got {text!r}")
    return capability, path


def number(text: str) -> float:
    """A number, or a fraction such as 1/255."""
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number such as 0.5 or 1/255, got {text!r}") from None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas or blanks."""
    values = tuple(number(part) for part in text.replace(",", " ").split())
    if not values:
        raise argparse.ArgumentTypeError("expected one number, or one per channel separated by commas, got nothing")
    return values


def precisions(text: str) -> tuple[str, ...]:
    """Names of precisions, separated by commas; fp32 is always one of them."""
    known = ("fp32", "fp16", "int8")
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"expected any of {', '.join(known)}, separated by commas, got {unknown[0]!r}")
    return tuple(name for name in known if name == "fp32" or name in names)


def class_index(text: str, names: Sequence[str]) -> int:
    """Class index from a name or an index; OptionError when there is none."""
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(names):
        return int(text)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise OptionError(f"--target: expected a class index from 0 to {len(names) - 1} or one of {shown}; got {text!r}")
