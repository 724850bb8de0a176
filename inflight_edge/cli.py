"""Command line: parse arguments, call the library, print a table or JSON.  Exit 0 done, 1 a check failed, 2 an error."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from inflight_edge._arguments import (
    engine_arguments,
    key_argument,
    model_arguments,
    plan,
    precisions,
    run_arguments,
    seed,
)
from inflight_edge._text import printable
from inflight_edge.errors import InflightError

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
        _flush()
    except InflightError as error:
        _forget_what_cannot_be_written()
        print(f"inflight-edge: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("inflight-edge: stopped", file=sys.stderr)
        return 130
    except MemoryError as error:
        print(f"inflight-edge: error: {error or 'out of memory'}; give it fewer or smaller images", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        _forget_what_cannot_be_written()
        sys.stderr.close()
        return 141
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        _forget_what_cannot_be_written()
        print(f"inflight-edge: error: {printable(f'{what}{error.strerror or error}')}", file=sys.stderr)
        return 2
    return status


def _flush() -> None:
    """Here and not when Python ends: what it raises then is no error of this program."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _forget_what_cannot_be_written() -> None:
    """Else Python tries again at its end with what standard output still holds, and fails with other words."""
    try:
        _flush()
    except OSError:
        with open(os.devnull, "w") as nothing, contextlib.suppress(OSError, ValueError):
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    from inflight_edge import __version__

    parser = _Parser(prog="inflight-edge", description="In-flight detection of backdoor triggers.")
    parser.add_argument("--version", action="version", version=f"inflight-edge {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    inspect = _add(commands, "inspect", "find a backdoor's target class and pattern", "workstation", "inspect")
    model_arguments(inspect)
    inspect.add_argument(
        "--out", type=Path, default=Path("inspection"), help="folder for the result (default %(default)s)"
    )

    calibrate = _add(commands, "calibrate", "fit guards and write the bundle", "workstation", "calibrate")
    model_arguments(calibrate)
    calibrate.add_argument(
        "--pattern",
        type=Path,
        metavar="FILE",
        help="patterns.safetensors of `inspect`; without it, inspects first, by --method and --steps",
    )
    calibrate.add_argument("--out", type=Path, default=Path("bundle"), help="the bundle's folder (default %(default)s)")
    calibrate.add_argument(
        "--precision",
        type=precisions,
        default=("fp32",),
        metavar="NAMES",
        help="fp32 and, separated by commas, fp16, int8: each with guards of its own (default fp32)",
    )
    calibrate.add_argument(
        "--unlearn",
        choices=("never", "auto", "always"),
        default="never",
        help="join the logits of a copy that has unlearned the pattern, so that more sources are found and every frame takes two "
        "networks' time; auto: if held-out images say so (default %(default)s)",
    )
    calibrate.add_argument("--force", action="store_true", help="replace an existing bundle")

    score = _add(commands, "score", "verdict per image", "device", "score")
    score.add_argument("bundle", type=Path, metavar="BUNDLE")
    score.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="image files, folders, or .npz with `images`"
    )
    score.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    engine_arguments(score)

    run_arguments(_add(commands, "run", "judge cameras or files in real time", "device", "run"))

    evaluate = _add(commands, "evaluate", "TPR, FPR, SIA and AUROC on labelled frames", "workstation", "evaluate")
    evaluate.add_argument("bundle", type=Path, metavar="BUNDLE")
    evaluate.add_argument(
        "--clean", type=Path, metavar="DATA", help="clean frames: folder with a sub-folder per class, or .npz"
    )
    evaluate.add_argument(
        "--triggered", type=Path, metavar="DATA", help="triggered frames, labelled with their true class"
    )
    evaluate.add_argument("--json", action="store_true", help="JSON instead of a table")
    engine_arguments(evaluate)

    report = _add(commands, "report", "one HTML file about a bundle, for people", "workstation", "report")
    report.add_argument("bundle", type=Path, metavar="BUNDLE")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="the file (default %(default)s)")
    report.add_argument(
        "--evaluation", type=Path, metavar="FILE", help="output of `evaluate --json` on held-out frames"
    )
    report.add_argument("--json", action="store_true", help="JSON instead of a line")
    key_argument(report)

    verify = _add(commands, "verify", "check a bundle on this machine", "device", "verify")
    verify.add_argument("bundle", type=Path, metavar="BUNDLE")
    verify.add_argument("--json", action="store_true", help="JSON instead of a table")
    key_argument(verify)

    sign = _add(commands, "sign", "sign a bundle with the owner's private key", "device", "sign")
    sign.add_argument("bundle", type=Path, metavar="BUNDLE")
    sign.add_argument("--key", type=Path, required=True, metavar="PRIVATE.pem", help="private key (PEM, Ed25519)")

    keygen = _add(commands, "keygen", "make a pair of keys to sign and check bundles", "device", "keygen")
    keygen.add_argument("private", type=Path, metavar="PRIVATE.pem", help="new file, mode 600")
    keygen.add_argument("public", type=Path, metavar="PUBLIC.pem", help="new file, for the devices")

    compile_ = _add(commands, "compile", "TensorRT plan of a bundle, on the device", "device", "compile_")
    compile_.add_argument("bundle", type=Path, metavar="BUNDLE")
    compile_.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32", help="default %(default)s")
    compile_.add_argument("--workspace", type=int, metavar="BYTES", help="most memory that a layer may use")
    compile_.add_argument("--batch", type=int, default=1, metavar="N", help="frames at once (default %(default)s)")
    compile_.add_argument("--out", type=Path, metavar="FILE", help="the plan (default: among this user's plans)")
    compile_.add_argument("--json", action="store_true", help="JSON instead of a line")
    key_argument(compile_)

    doctor = _add(commands, "doctor", "what this machine has, and how to get the rest", "device", "doctor")
    doctor.add_argument("--json", action="store_true", help="JSON instead of a table")
    doctor.add_argument(
        "--run",
        type=Path,
        dest="run_bundle",
        metavar="BUNDLE",
        help="also check and time this bundle on all engines here",
    )
    doctor.add_argument("--report", type=Path, metavar="FILE", help="of --run (default inflight-edge-report.json)")
    doctor.add_argument("--frames", type=int, metavar="N", help="frames that --run times (default 500)")
    key_argument(doctor)

    bench = _add(commands, "bench", "latency per stage on this machine", "device", "bench")
    bench.add_argument("bundle", type=Path, metavar="BUNDLE")
    bench.add_argument("--frames", type=int, default=10000, metavar="N", help="frames to time (default %(default)s)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    engine_arguments(bench)

    triton = _add(
        commands, "export-triton", "model repository for NVIDIA Triton Inference Server", "device", "export_triton"
    )
    triton.add_argument("bundle", type=Path, metavar="BUNDLE")
    triton.add_argument("repository", type=Path, metavar="REPOSITORY")
    triton.add_argument("--form", choices=("ensemble", "single"), help="default ensemble")
    triton.add_argument(
        "--runtime",
        choices=("onnx", "tensorrt", "python"),
        help="what runs the network (default onnx)",
    )
    triton.add_argument("--precision", choices=("fp32", "fp16", "int8"), help="default fp32")
    triton.add_argument("--name", default="inflight", help="of the served model (default %(default)s)")
    triton.add_argument(
        "--plan",
        type=plan,
        action="append",
        metavar="CC=FILE",
        help="TensorRT plan of a compute capability: 8.7=a.plan",
    )
    triton.add_argument("--max-batch", type=int, metavar="N", help="frames joined at most (default 32)")
    triton.add_argument("--instances", type=int, metavar="N", help="copies of each model (default 1)")
    triton.add_argument("--queue", type=int, metavar="N", help="requests that wait at most (default 256)")
    triton.add_argument(
        "--python-path", action="append", metavar="FOLDER", help="in front of the server's module path; repeatable"
    )
    triton.add_argument(
        "--guards-only", action="store_true", help="add the guards to an exported ensemble as a new version"
    )
    triton.add_argument("--json", action="store_true", help="JSON instead of lines")
    key_argument(triton)

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


if __name__ == "__main__":
    sys.exit(main())
