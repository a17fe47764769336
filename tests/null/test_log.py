"""What a log shows of texts that come from outside."""

from __future__ import annotations

import io
import logging

import pytest

from executor.log import DETAILS, printable, setup_logging

HOSTILE = "name\nE 00:00:00.000 [api] forged\r\x1b[2J\x1b]0;title\x07\x9b31m\u202egpj\u2028\ud800"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    setup_logging("test", "debug")
    return stream


def test_printable() -> None:
    assert printable(HOSTILE).isprintable()
    assert printable("a\tb\nc") == r"a\tb\nc"
    assert printable("Grüße, 你好, 👍") == "Grüße, 你好, 👍"


def test_an_entry_is_one_line_whatever_it_quotes(log: io.StringIO) -> None:
    logging.getLogger("octavo").debug("unknown fields are ignored: %s", HOSTILE)
    text = log.getvalue()
    assert text.count("\n") == 1 and text[:-1].isprintable()
    assert text.startswith("D ") and r"name\nE 00:00:00.000 [api] forged\r\x1b[2J" in text


def test_tracebacks_and_details_are_marked(log: io.StringIO) -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("octavo").exception("it failed", stack_info=True)
    logging.getLogger("octavo").error("a worker failed", extra={DETAILS: f"Traceback\n{HOSTILE}"})
    first, *lines = log.getvalue().splitlines()
    assert first.startswith("E ") and first.endswith("[test] it failed")
    entries = [line for line in lines if not line.startswith("  | ")]
    assert len(entries) == 1 and entries[0].endswith("[test] a worker failed")
    assert any("ValueError: name" in line for line in lines)
    assert all(line.isprintable() for line in lines)
