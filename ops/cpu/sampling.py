"""The sampling kernels: the C interface of ``csrc/sampling.h`` in Python.

A step is one call. Request parameters live in a table by slot, ``SLOT_PARAMS``, written when the request arrives; a
step passes only pointers.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SLOT_PARAMS = np.dtype(
    [
        ("presence_penalty", np.float64),
        ("frequency_penalty", np.float64),
        ("seed", np.uint64),
        ("allowed_ids", np.uint64),
        ("stop_ids", np.uint64),
        ("bias_ids", np.uint64),
        ("biases", np.uint64),
        ("bad_words", np.uint64),
        ("bad_word_ends", np.uint64),
        ("logprob_ids", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("top_k", np.int32),
        ("min_tokens", np.int32),
        ("num_allowed", np.int32),
        ("num_stop", np.int32),
        ("num_biases", np.int32),
        ("num_bad_words", np.int32),
        ("num_logprob_ids", np.int32),
        ("num_logprobs", np.int32),
    ],
    align=True,
)
"""``OctavoSlotParams``. Whoever writes an entry keeps the arrays behind its addresses alive."""

NEUTRAL_PARAMS = np.zeros(1, SLOT_PARAMS)
"""Parameters that leave the model's distribution unchanged."""
for _name in ("temperature", "top_p", "repetition_penalty"):
    NEUTRAL_PARAMS[_name] = 1
for _name in ("num_allowed", "num_logprobs"):
    NEUTRAL_PARAMS[_name] = -1

ALL_LOGPROBS = np.iinfo(np.int32).max
"""Value of ``num_logprobs`` that asks for the whole vocabulary."""

ROW_OK, ROW_NOT_FINITE, ROW_NOTHING_LEFT = 0, 1, 2


class SampleStep(ctypes.Structure):
    """``OctavoSampleStep`` of ``csrc/sampling.h``. Pointers are addresses; 0 is null."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("raw_logits", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        ("vocab_size", ctypes.c_int32),
        ("slots", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("history", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("num_prompt", ctypes.c_void_p),
        ("bitmask", ctypes.c_void_p),
        ("bitmask_stride", ctypes.c_int64),
        ("bitmask_rows", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("given_tokens", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("status", ctypes.c_void_p),
        ("logprob_starts", ctypes.c_void_p),
        ("logprob_ids", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
    )


def address(array: npt.NDArray[Any]) -> int:
    """Address of an array's data. The caller keeps the array alive."""
    result: int = array.__array_interface__["data"][0]
    return result


class SamplingKernels:
    """The functions of a compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.octavo_sample.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        library.octavo_sample.restype = ctypes.c_int32
        library.octavo_token_history_new.argtypes = (ctypes.c_int32,)
        library.octavo_token_history_new.restype = ctypes.c_void_p
        library.octavo_token_history_clear.argtypes = (ctypes.c_void_p, ctypes.c_int32)
        library.octavo_token_history_clear.restype = None
        library.octavo_token_history_free.argtypes = (ctypes.c_void_p,)
        library.octavo_token_history_free.restype = None
        assert library.octavo_slot_params_size() == SLOT_PARAMS.itemsize
        assert library.octavo_sample_step_size() == ctypes.sizeof(SampleStep)
        self.sample_step = library.octavo_sample
        """Takes the address of a ``SampleStep`` and a number of threads; returns how many rows failed."""
        self.library = library

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        numbers: Tensor,
    ) -> Tensor:
        """The op ``sample`` (``ops/reference/sampling.py``)."""
        rows, vocab_size = logits.shape
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            raise ValueError("logits must be float32 with contiguous rows")
        params = np.repeat(NEUTRAL_PARAMS, rows)
        params["temperature"] = temperature.numpy()
        params["top_k"] = top_k.numpy()
        params["top_p"] = top_p.numpy()
        params["min_p"] = min_p.numpy()
        slots = np.arange(rows, dtype=np.int32)
        lengths = np.zeros(rows, np.int64)
        numbers = numbers.contiguous()
        tokens = torch.empty(rows, dtype=torch.int64)
        status = np.empty(rows, np.int32)
        step = SampleStep(
            logits=logits.data_ptr(),
            row_stride=logits.stride(0),
            num_rows=rows,
            vocab_size=vocab_size,
            slots=address(slots),
            params=address(params),
            lengths=address(lengths),
            num_prompt=address(lengths),
            numbers=numbers.data_ptr(),
            tokens=tokens.data_ptr(),
            status=address(status),
        )
        self.sample_step(ctypes.addressof(step), torch.get_num_threads())
        return tokens


class TokenHistory:
    """Tokens seen by requests with penalties, by slot. Only such slots take memory."""

    def __init__(self, kernels: SamplingKernels, num_slots: int) -> None:
        self._clear = kernels.library.octavo_token_history_clear
        self.handle: int = kernels.library.octavo_token_history_new(num_slots)
        if not self.handle:
            raise MemoryError("out of memory for the token history")
        weakref.finalize(self, kernels.library.octavo_token_history_free, self.handle)

    def clear(self, slot: int) -> None:
        """Forgets a slot's request."""
        self._clear(self.handle, slot)
