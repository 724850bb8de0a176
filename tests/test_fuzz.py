"""Hostile bytes for every reader, by hypothesis; ``make fuzz`` runs the same targets for longer, guided by coverage."""

from __future__ import annotations

import pytest
from fuzz.targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_end_in_silence_or_the_promised_error(name: str) -> None:
    @settings(max_examples=250, deadline=None)
    @given(st.binary(min_size=16, max_size=64))
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()
