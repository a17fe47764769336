"""Prints an answer as it is written: python streaming.py [URL]"""

import json
import sys
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

request = {
    "messages": [{"role": "user", "content": "Count from one to ten."}],
    "temperature": 0,
    "max_tokens": 48,
    "stream": True,
    "stream_options": {"include_usage": True},
}
call = urllib.request.Request(
    f"{URL}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(call) as response:
    for line in response:  # server-sent events: lines that begin with "data: ", comments, and empty ones
        if not line.startswith(b"data: ") or line == b"data: [DONE]\n":
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            sys.exit(chunk["error"]["message"])
        for choice in chunk["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
        if usage := chunk.get("usage"):
            print(f"\n({usage['prompt_tokens']} + {usage['completion_tokens']} tokens)")
