"""TensorRT plans on disk: which model, library and GPU each was made for.  They lie beside bundles, never inside.

A plan is two files: ``NAME.plan``, TensorRT's bytes, and ``NAME.plan.json``, which says for what it was built, holds its
SHA-256, and is written last, after its self-test passed: a plan without it is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from inflight_edge._strict import expect_object, parse_json
from inflight_edge.engines._tensorrt_library import load_tensorrt
from inflight_edge.errors import BundleError, DependencyError, EngineError
from inflight_edge.scoring.device import Device

__all__ = [
    "Identity",
    "identity_here",
    "plan_path",
    "plans_folder",
    "read_described",
    "read_plan",
    "read_timing_cache",
    "refuse_shared",
    "timing_cache_path",
    "write_plan",
    "write_timing_cache",
]

FORMAT = 2  # counts the recipe of a build too: strongly typed, TF32 off, one frame to the batch
MAX_DESCRIPTION_BYTES = 1 << 20
_KEYS = ("format", "identity", "options", "sha256", "self_test")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a plan was built from and for; anything else makes it another plan."""

    onnx_sha256: str
    precision: str
    tensorrt: str
    gpu: str
    compute_capability: str


def identity_here(model: bytes, precision: str, device: Device) -> Identity:
    """Identity of the plan that would be built here.  Raises DependencyError without TensorRT."""
    version, _ = load_tensorrt()
    capability = ".".join(map(str, device.capability))
    return Identity(hashlib.sha256(model).hexdigest(), precision, version, device.gpu, capability)


def plans_folder() -> Path:
    """INFLIGHT_EDGE_PLANS, else the user's cache folder: plans can be made again."""
    given = os.environ.get("INFLIGHT_EDGE_PLANS")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(given) if given else Path(cache) / "inflight-edge" / "plans"


def plan_path(model: bytes, precision: str) -> Path:
    """Where the plan of a model lies unless the user says otherwise."""
    return plans_folder() / f"{hashlib.sha256(model).hexdigest()[:16]}-{precision}.plan"


def read_plan(path: Path, expected: Identity) -> bytes:
    """Bytes of the plan at ``path``.

    Raises DependencyError when there is none, EngineError when it is damaged or was made for something else.
    """
    remedy = f"run `inflight-edge compile BUNDLE --precision {expected.precision}` on this machine"
    plan, got, _ = read_described(path, remedy)
    for name, here in asdict(expected).items():
        if got[name] != here:
            raise EngineError(f"{path}: made for {name} {got[name]}, but here it is {here}; {remedy}")
    return plan


def read_described(path: Path, remedy: str) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """Bytes of the plan at ``path``, what it was made for, and the options of its build.

    Raises DependencyError when there is none, EngineError when it is damaged; ``remedy`` ends the message.
    """
    described = _description(path)
    try:
        if not described.is_file() or not path.is_file():
            raise DependencyError(f"{path}: expected a plan for TensorRT with its description, got none; {remedy}")
        refuse_shared(path.parent)
        refuse_shared(path)
        refuse_shared(described)
    except PermissionError as error:
        raise EngineError(
            f"{path}: cannot be read as this user: {error.strerror}; let it read the folder, or {remedy}"
        ) from error
    try:
        with open(described, "rb") as file:
            parsed = parse_json(file.read(MAX_DESCRIPTION_BYTES), str(described))
        description = expect_object(parsed, _KEYS, str(described))
        if description["format"] != FORMAT:
            raise EngineError(f"{described}: expected format {FORMAT}, got {description['format']!r}; {remedy}")
        names = tuple(field.name for field in fields(Identity))
        got = expect_object(description["identity"], names, f"{described}: identity")
    except BundleError as error:
        raise EngineError(f"{error}; {remedy}") from error
    plan = path.read_bytes()
    if (digest := hashlib.sha256(plan).hexdigest()) != description["sha256"]:
        raise EngineError(f"{path}: expected SHA-256 {description['sha256']}, got {digest}: it is damaged; {remedy}")
    options = description["options"]
    return plan, got, options if isinstance(options, dict) else {}


def refuse_shared(path: Path) -> None:
    """Raise EngineError where group or others may change a plan, or exchange one in a folder: it is code for TensorRT.

    In a folder such as /tmp, with the sticky bit, they cannot.
    """
    mode = path.stat().st_mode
    if mode & 0o022 and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
        raise EngineError(
            f"{path}: expected what its owner alone can change, since a plan is code for TensorRT, got mode "
            f"{stat.S_IMODE(mode):o}; `chmod go-w {path}`, or take another folder for the plans"
        )


def write_plan(path: Path, plan: bytes, identity: Identity, options: dict[str, Any], self_test: dict[str, Any]) -> None:
    """Write a plan that passed its self-test; the old one is gone first, so that the two files never disagree."""
    description = {
        "format": FORMAT,
        "identity": asdict(identity),
        "options": options,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "self_test": self_test,
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _description(path).unlink(missing_ok=True)
    _replace(path, plan)
    _replace(_description(path), (json.dumps(description, indent=1) + "\n").encode())


def read_timing_cache(path: Path) -> bytes:
    """What earlier builds measured, or nothing: TensorRT refuses one of another version or GPU itself."""
    return path.read_bytes() if path.is_file() else b""


def write_timing_cache(path: Path, data: bytes) -> None:
    """Keep it for the next build."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _replace(path, data)


def timing_cache_path(identity: Identity) -> Path:
    """One per version and GPU."""
    key = hashlib.sha256(f"{identity.tensorrt}\n{identity.gpu}\n{identity.compute_capability}".encode()).hexdigest()
    return plans_folder() / f"timing-{key[:16]}.cache"


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _replace(path: Path, data: bytes) -> None:
    """Write a file in one step."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # whatever the umask: read_described refuses what others can write
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
