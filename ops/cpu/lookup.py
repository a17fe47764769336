"""The kernel that finds earlier text: the C interface of ``csrc/lookup.h`` in Python."""

from __future__ import annotations

import ctypes

import numpy as np

LOOKUP = np.dtype(
    [
        ("tokens", np.uint64),
        ("num_tokens", np.int64),
        ("pool", np.uint64),
        ("pool_size", np.int64),
        ("followed_size", np.int64),
        ("followed_place", np.int64),
        ("followed_match", np.int64),
        ("limit", np.int32),
        ("count", np.int32),
    ],
    align=True,
)
"""``OctavoLookup``: a request. Whoever writes one keeps the arrays behind its addresses alive."""


class LookupOptions(ctypes.Structure):
    """``OctavoLookupOptions``."""

    _fields_ = (("factor", ctypes.c_double), ("least", ctypes.c_int32), ("most", ctypes.c_int32))


class LookupKernel:
    """The function of a compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer = ctypes.c_void_p
        library.octavo_lookup.argtypes = (pointer, ctypes.c_int32, pointer, pointer, pointer)
        library.octavo_lookup.restype = None
        assert library.octavo_lookup_size() == LOOKUP.itemsize
        self.propose = library.octavo_lookup
        """Takes the addresses of rows (``LOOKUP``), their number, and the addresses of ``LookupOptions``, int32 tokens
        and int8 kinds."""
        self.library = library
