"""Files with the secret of a cluster. Needs neither ZeroMQ nor torch."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from executor.base import ModelError

KEY_BYTES = 32
_HEAD = "octavo-cluster-key-1:"
_MOST_BYTES = 4096
"""Size of the largest file that is read."""


def create_key_file(path: Path) -> None:
    """Writes a new secret, which only this user can read.

    Raises:
        ModelError: The file exists, or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ModelError(f"{path}: exists already; machines that use it would no longer know the others") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{_HEAD}{secrets.token_hex(KEY_BYTES)}\n")


class HeldKey:
    """A key file without a name: processes of this user can read it by its path while this process lives."""

    def __init__(self, secret: bytes | None = None) -> None:
        """
        Args:
            secret: None: a new one.
        """
        self.secret = secrets.token_bytes(KEY_BYTES) if secret is None else secret
        self._descriptor = os.memfd_create("octavo-cluster-key", os.MFD_CLOEXEC)
        os.write(self._descriptor, f"{_HEAD}{self.secret.hex()}\n".encode())
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Nobody can read it any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_key_file(path: str) -> bytes:
    """The secret in a file.

    Raises:
        ModelError: It cannot be read, or is no such file; the message names the option.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        raise ModelError(
            f"--cluster-key {path}: {error.strerror}; octavo cluster-key FILE makes one, which all machines need"
        ) from None
    match = re.fullmatch(rf"{_HEAD}([0-9a-f]{{{2 * KEY_BYTES}}})", text)
    if match is None:
        raise ModelError(f"--cluster-key {path}: not a file that octavo cluster-key has made, or of another version")
    return bytes.fromhex(match[1])
