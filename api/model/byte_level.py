"""How byte-level vocabularies spell bytes."""

from __future__ import annotations

from typing import Final


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters are themselves, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(rest)}


BYTE_OF_CHAR: Final = _byte_alphabet()
_CHARS: Final = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def spelled(content: bytes) -> str:
    """Bytes as a byte-level vocabulary spells them, a character each."""
    return content.decode("latin-1").translate(_CHARS)
