"""How similar vectors of texts are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Similarity = Callable[[F32, F32], float]
"""Compares what was pooled of two texts."""


def _cosine(x: F32, y: F32) -> float:
    """Cosine of the angle between two vectors, -1 to 1; 0 if one of them is zero."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    lengths = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return max(-1.0, min(1.0, float((a * b).sum()) / lengths)) if lengths else 0.0


def _dot(x: F32, y: F32) -> float:
    return float((x.astype(np.float64) * y.astype(np.float64)).sum())


def _euclidean(x: F32, y: F32) -> float:
    return -float(np.sqrt(np.square(x.astype(np.float64) - y.astype(np.float64)).sum()))


def _manhattan(x: F32, y: F32) -> float:
    return -float(np.abs(x.astype(np.float64) - y.astype(np.float64)).sum())


SIMILARITIES: Mapping[str, Similarity] = {
    "cosine": _cosine,
    "dot": _dot,
    "euclidean": _euclidean,
    "manhattan": _manhattan,
}
"""How similar two vectors are, by sentence-transformers' names; distances are negative."""
