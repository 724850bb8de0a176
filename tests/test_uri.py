"""Addresses: options taken once, strictly; no secret in a message."""

from __future__ import annotations

import pytest

from inflight_edge import OptionError
from inflight_edge.uri import Uri, one_of, real_number, whole_number, without_secrets

SCHEMES = frozenset({"file", "http"})


def test_parts() -> None:
    address = Uri("http://host/path?query=a#first=1&second=a%26b", SCHEMES)
    assert (address.scheme, address.rest) == ("http", "//host/path?query=a")
    assert address.take("second", str, "") == "a&b"
    with pytest.raises(OptionError, match="unknown option first"):
        address.finish()
    assert address.take("first", int, 0) == 1
    address.finish()
    assert address.take("third", int, 7) == 7


def test_what_has_no_known_scheme_is_a_path() -> None:
    address = Uri("other:a#b=1", SCHEMES)
    assert (address.scheme, address.rest) == ("", "other:a#b=1")


def test_an_option_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="expected the option a once, got it twice"):
        Uri("file:x#a=1&a=2", SCHEMES)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://user:s3cret@camera:554/stream#fps=5", "rtsp://...@camera:554/stream#fps=5"),
        ("mqtt://token@host/topic", "mqtt://...@host/topic"),
        ("http://a:b@c@host/", "http://...@host/"),
        ("rtsp://user:s3#cret@camera:554/stream", "rtsp://...@camera:554/stream"),
        ("mqtt://user:s3/cret@host/topic", "mqtt://...@host/topic"),
        ("rtsp://cam/user=me_password=s3cret_channel=1#fps=5", "rtsp://cam/user=..._password=..._channel=1#fps=5"),
        ("https://host/hook?key=s3cret#send=all", "https://host/...#send=all"),
        ("https://hooks.example/services/T0/s3cret", "https://hooks.example/..."),
        ("mqtt://host/t#user=a&password=s3_cret&qos=1", "mqtt://host/t#user=...&password=...&qos=1"),
        ("file:a@b.jsonl#keep=1", "file:a@b.jsonl#keep=1"),
        ("/plain/path", "/plain/path"),
    ],
)
def test_messages_hold_no_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize("text", ["http://u:pass#s3cret@h/x", "http://u:pass#s3cret@h/x#a=1", "file:x#s3cret/y&a=1"])
def test_number_sign_in_a_login_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(OptionError, match="as %23") as raised:
        Uri(text, SCHEMES)
    assert "s3cret" not in str(raised.value).replace(without_secrets(text), "")
    assert "@" not in text or "s3cret" not in str(raised.value)


@pytest.mark.parametrize("text", ["-1", "11", "1.5", "", "many", "nan"])
def test_whole_numbers_within_their_limits(text: str) -> None:
    assert whole_number(0, 10)("10") == 10
    assert whole_number(0)("123456789012345678901") == 123456789012345678901
    with pytest.raises(ValueError, match="expected an integer from 0 to 10, got"):
        whole_number(0, 10)(text)


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "", "1,5"])
def test_real_numbers_within_their_limits(text: str) -> None:
    assert real_number(0)("1e3") == 1000.0
    with pytest.raises(ValueError, match="expected a number of at least 0, got"):
        real_number(0)(text)


def test_one_of() -> None:
    assert one_of(("a", "b"))("b") == "b"
    with pytest.raises(ValueError, match="expected one of a, b, got 'c'"):
        one_of(("a", "b"))("c")
