"""Kills a pipeline again and again and checks what its file holds: ``python kill_program.py FOLDER N_KILLS SEED``.

Each run is a fork of this process, which has imported everything and has no thread.  The run tells through a pipe what
its sink has taken; the file must then hold every outcome told, whole, and at most its last line may be cut.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pipelines import ListSource, stub_detector
from run_program import FRAMES, LinesSink

from inflight_edge import Outcome, Pipeline, sinks
from inflight_edge.events import Context


class Telling:
    """Passes on to a sink, and writes each index to a pipe once the sink has taken it."""

    name = "telling"

    def __init__(self, path: Path, pipe: int) -> None:
        make_sink = getattr(sinks, "make_sink", None)
        self.sink = make_sink(f"jsonl:{path}") if make_sink else LinesSink(str(path))
        self.pipe = pipe

    def open(self, context: Context) -> None:
        self.sink.open(context)

    def write(self, outcome: Outcome) -> None:
        self.sink.write(outcome)
        os.write(self.pipe, b"%d\n" % outcome.frame.index)

    def flush(self) -> None:
        self.sink.flush()

    def close(self) -> None:
        self.sink.close()


def run(path: Path, pipe: int) -> None:
    """The process that will be killed."""
    detector = stub_detector()
    source = ListSource(itertools.cycle(FRAMES))
    Pipeline(detector, [source], [Telling(path, pipe)], queue=8, batch=2).run()


def kill_one(path: Path, after_s: float) -> int:
    """Start, kill ``after_s`` after the first outcome, check; returns how many outcomes were told."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            run(path, writing)
        finally:
            os._exit(99)
    os.close(writing)
    told = b""
    try:
        assert select.select([reading], [], [], 20)[0], "no outcome"
        end = select.select([], [], [], after_s)  # only waits
        assert end == ([], [], [])
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        while chunk := os.read(reading, 1 << 20):
            told += chunk
        os.close(reading)
    assert os.WIFSIGNALED(status), f"it ended by itself: {status}"
    last = int(told.split()[-1])
    *lines, rest = path.read_bytes().split(b"\n")
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == list(range(len(records))), "a line is missing or twice"
    assert len(records) > last, f"told {last}, found {len(records)}"
    expected = ["accept", "trigger", "unguarded"]
    assert all(record["decision"] == expected[record["index"] % 3] for record in records)
    assert rest == b"" or len(lines) == last + 1, "only the line that was being written may be cut"
    return last + 1


def main() -> None:
    folder, n_kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    told = 0
    for i in range(n_kills):
        path = folder / f"{i}.jsonl"
        told += kill_one(path, chance.uniform(0.0, 0.06))
        path.unlink()
    print(n_kills, told)


if __name__ == "__main__":
    main()
