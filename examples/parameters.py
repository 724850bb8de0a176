"""Writes the parameters of one guard of a bundle for examples/score.c.

python examples/parameters.py BUNDLE CLASS > parameters

BUNDLE  folder of the bundle.  CLASS: index of the class that the guard is for.
"""

from __future__ import annotations

import sys

import numpy as np

from inflight_edge import InflightError, read_bundle
from inflight_edge.guard import KINDS, Guard
from inflight_edge.scoring.parameters import prepare


def pack(guard: Guard) -> bytes:
    """The file that examples/score.c reads; its first comment says what stands in it."""
    p = prepare(guard)
    header = [KINDS.index(guard.kind), guard.n_features, len(guard.classes), guard.n_components, guard.target_row]
    integers = [np.array([*header, p.whitener.size]), p.offsets, guard.classes]
    floats = [p.mean, p.scale, p.origin, p.centres, p.whitener, p.constants]
    return b"".join(
        [part.astype("<i4").tobytes() for part in integers] + [part.astype("<f4").tobytes() for part in floats]
    )


def main(arguments: list[str]) -> int:
    """Exit code: 0, or 2 with one line of what is wrong."""
    if len(arguments) != 2 or not arguments[1].isdecimal():
        print("usage: python examples/parameters.py BUNDLE CLASS > parameters", file=sys.stderr)
        return 2
    try:
        guards = {guard.target: guard for guard in read_bundle(arguments[0]).guards}
    except InflightError as error:
        print(error, file=sys.stderr)
        return 2
    if int(arguments[1]) not in guards:
        print(f"class: expected one of {sorted(guards)}, got {arguments[1]}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(pack(guards[int(arguments[1])]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
