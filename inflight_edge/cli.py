"""Command line: parse arguments, call the library, print a table or JSON.  Exit 0 done, 1 a check failed, 2 an error."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from inflight_edge.errors import InflightError, OptionError

__all__ = ["main"]

Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and name the remedy."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an InflightError becomes one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except InflightError as error:
        print(f"inflight-edge: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("inflight-edge: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stderr.close()
        return 141
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        print(f"inflight-edge: error: {what}{error.strerror or error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    from inflight_edge import __version__

    parser = _Parser(prog="inflight-edge", description="In-flight detection of backdoor triggers.")
    parser.add_argument("--version", action="version", version=f"inflight-edge {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = _add(commands, "inspect", "find a backdoor's target class and pattern", "workstation", "inspect")
    _model_arguments(inspect)
    inspect.add_argument("--steps", type=int, default=400, help="search steps per class (default %(default)s)")
    inspect.add_argument(
        "--out", type=Path, default=Path("inspection"), help="folder for the result (default %(default)s)"
    )

    calibrate = _add(commands, "calibrate", "fit guards and write the bundle", "workstation", "calibrate")
    _model_arguments(calibrate)
    calibrate.add_argument(
        "--pattern", type=Path, metavar="FILE", help="patterns.safetensors of `inspect`; without it, inspects first"
    )
    calibrate.add_argument(
        "--steps", type=int, default=400, help="search steps per class without --pattern (default %(default)s)"
    )
    calibrate.add_argument("--out", type=Path, default=Path("bundle"), help="the bundle's folder (default %(default)s)")
    calibrate.add_argument("--force", action="store_true", help="replace an existing bundle")

    score = _add(commands, "score", "verdict per image", "device", "score")
    score.add_argument("bundle", type=Path, metavar="BUNDLE")
    score.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="image files, folders, or .npz with `images`"
    )
    score.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    _engine_arguments(score)

    evaluate = _add(commands, "evaluate", "TPR, FPR, SIA and AUROC on labelled frames", "workstation", "evaluate")
    evaluate.add_argument("bundle", type=Path, metavar="BUNDLE")
    evaluate.add_argument(
        "--clean", type=Path, metavar="DATA", help="clean frames: folder with a sub-folder per class, or .npz"
    )
    evaluate.add_argument(
        "--triggered", type=Path, metavar="DATA", help="triggered frames, labelled with their true class"
    )
    evaluate.add_argument("--json", action="store_true", help="JSON instead of a table")
    _engine_arguments(evaluate)

    verify = _add(commands, "verify", "check a bundle on this machine", "device", "verify")
    verify.add_argument("bundle", type=Path, metavar="BUNDLE")
    verify.add_argument("--json", action="store_true", help="JSON instead of a table")

    doctor = _add(commands, "doctor", "what this machine has, and how to get the rest", "device", "doctor")
    doctor.add_argument("--json", action="store_true", help="JSON instead of a table")

    bench = _add(commands, "bench", "latency per stage on this machine", "device", "bench")
    bench.add_argument("bundle", type=Path, metavar="BUNDLE")
    bench.add_argument("--frames", type=int, default=10000, metavar="N", help="frames to time (default %(default)s)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    _engine_arguments(bench)

    demo = _add(commands, "demo", "the whole path on handwritten digits", "workstation", "demo")
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for what is made (default %(default)s)")
    demo.add_argument("--seed", type=seed, default=0)
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _add(commands: argparse._SubParsersAction[_Parser], name: str, text: str, side: str, function: str) -> _Parser:
    """A sub-command whose function is imported when it runs: the workstation's side needs torch, the device's does not."""

    def run(options: argparse.Namespace) -> int:
        from importlib import import_module

        from inflight_edge.errors import DependencyError

        module = "inflight_edge.calibration.commands" if side == "workstation" else "inflight_edge.commands"
        try:
            command: Command = getattr(import_module(module), function)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package == "inflight_edge":
                raise
            raise DependencyError(f"`{name}` needs {package}; pip install 'inflight-edge[calibration]'") from error
        return command(options)

    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
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
        default="auto",
        help="patterns looked for: patches, additions, or both (default %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def _engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("onnxruntime",), default="onnxruntime")
    parser.add_argument("--scorer", choices=("auto", "cpu", "reference"), default="auto")
    parser.add_argument("--threads", type=int, help="threads of the engine")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def seed(text: str) -> int:
    """A seed: an integer from 0 to 2**31 - 1."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {2**31 - 1}, got {text!r}")
    return int(text)


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


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Left-aligned columns, a header and a rule."""
    cells = [[_printable(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _printable(text: str) -> str:
    """Text for one line: line breaks and other control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def class_index(text: str, names: Sequence[str]) -> int:
    """Class index from a name or an index; OptionError when there is none."""
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(names):
        return int(text)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    raise OptionError(f"--target: expected a class index from 0 to {len(names) - 1} or one of {shown}; got {text!r}")


if __name__ == "__main__":
    sys.exit(main())
