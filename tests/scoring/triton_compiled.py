"""Run by test_triton.py: compiles the kernels without a GPU; prints a line of JSON per kind and architecture."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from inflight_edge.guard import KINDS
from inflight_edge.scoring.triton import compile_kernels, compile_one

folder = Path(sys.argv[1])
for architecture in (87, 90):
    for index, kind in enumerate(KINDS):
        compiled = compile_one(index, architecture)
        cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
        folder.joinpath(f"{kind}-{architecture}.cubin").write_bytes(cubin)
        print(
            json.dumps(
                {
                    "kind": kind,
                    "architecture": architecture,
                    "sha256": hashlib.sha256(cubin).hexdigest(),
                    "target": next(line for line in ptx.splitlines() if line.startswith(".target")),
                    "parameters": sum(".param ." in line for line in ptx.split(")")[0].splitlines()),
                    "exact_division": ("div.rn.f32" in ptx or "rcp.rn.f32" in ptx)
                    and "div.full" not in ptx
                    and "div.approx" not in ptx,
                }
            )
        )
compile_kernels(folder)
