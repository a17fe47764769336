"""Token usage of a response, with the names of OpenAI's completions; other protocols translate it."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int
    """Prompt tokens that came from the prefix cache."""


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int | UnsetType = UNSET
    """Set if the server separates reasoning from answers."""
    accepted_prediction_tokens: int | UnsetType = UNSET
    """Draft tokens that are part of the output; set if the server speculates."""
    rejected_prediction_tokens: int | UnsetType = UNSET
    """Draft tokens that are not part of the output, nor of ``completion_tokens``."""


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    """Tokens of all choices, up to and including the tokens that ended them."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    """Set if there are any."""
