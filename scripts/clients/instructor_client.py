"""instructor: answers as typed objects, in the modes that OpenAI-compatible servers are used with."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


class Capital(BaseModel):
    city: Literal["Paris", "Rome"]
    is_in_europe: bool


modes = (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS)
for mode in modes:
    client = instructor.from_openai(openai.OpenAI(max_retries=0), mode=mode)
    capital, raw = client.chat.completions.create_with_completion(
        model=os.environ["OCTAVO_MODEL"],
        messages=MESSAGES,
        response_model=Capital,
        temperature=0,
        max_tokens=64,
        max_retries=0,
    )
    assert isinstance(capital, Capital) and raw.usage
print(f"instructor {importlib.metadata.version('instructor')}: {', '.join(mode.name for mode in modes)}")
