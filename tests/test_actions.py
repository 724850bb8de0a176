"""Label and alarm: what a verdict leads to."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inflight_edge import Decision, OptionError, Verdict
from inflight_edge.actions import Alarm, AlarmRule, label

ACCEPT, TRIGGER = Verdict(Decision.ACCEPT, 3, None, -1.0), Verdict(Decision.TRIGGER, 3, 1, 1.0)
UNGUARDED, INVALID = Verdict(Decision.UNGUARDED, 2), Verdict(Decision.INVALID, 3, reason="broken")


def test_label_is_the_prediction_only_if_the_verdict_passes() -> None:
    assert [label(v, repair=False) for v in (ACCEPT, UNGUARDED, TRIGGER, INVALID)] == [3, 2, None, None]


def test_repair_gives_the_source_of_a_trigger_and_nothing_of_the_invalid() -> None:
    assert [label(v, repair=True) for v in (ACCEPT, UNGUARDED, TRIGGER, INVALID)] == [3, 2, 1, None]
    odd = Verdict(Decision.INVALID, 3, source=1, reason="broken")
    assert label(odd, repair=True) is None


@given(n=st.integers(1, 6), more=st.integers(0, 6), flags=st.lists(st.booleans(), max_size=40))
def test_alarm_is_on_while_n_of_the_last_m_frames_were_flagged(n: int, more: int, flags: list[bool]) -> None:
    alarm = Alarm(AlarmRule(n, n + more))
    was_on = False
    for i, flagged in enumerate(flags):
        changed = alarm.update(TRIGGER if flagged else ACCEPT)
        assert alarm.on == (sum(flags[max(0, i + 1 - n - more) : i + 1]) >= n)
        assert changed == (alarm.on != was_on)
        was_on = alarm.on


def test_what_cannot_be_judged_counts_like_a_trigger_and_the_unguarded_do_not() -> None:
    alarm = Alarm(AlarmRule(2, 2))
    states = []
    for verdict in (INVALID, TRIGGER, UNGUARDED, INVALID, INVALID):
        alarm.update(verdict)
        states.append(alarm.on)
    assert states == [False, True, False, False, True]


def test_rule_is_read_from_text() -> None:
    assert AlarmRule.parse("3/5") == AlarmRule(3, 5)
    for text in ("", "3", "3/", "/5", "-1/5", "3/5/7", "three/5", "3 / 5", "\u0663/\u0665"):
        with pytest.raises(OptionError, match=re.escape(f"alarm: expected n/m such as 3/5, got {text!r}")):
            AlarmRule.parse(text)
    for n, m in ((0, 5), (6, 5), (1, 10_001)):
        with pytest.raises(OptionError, match=f"alarm: expected n/m with 1 <= n <= m <= 10000, got {n}/{m}"):
            AlarmRule.parse(f"{n}/{m}")
