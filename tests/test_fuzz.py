"""Hostile bytes for every reader, by hypothesis, the same ones in every run; ``make fuzz`` looks for new ones."""

from __future__ import annotations

import pytest
from fuzz.targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_end_in_silence_or_the_promised_error(name: str) -> None:
    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.binary(min_size=16, max_size=64))
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()
