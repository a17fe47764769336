"""Asks a server a question over plain HTTP: python chat.py [URL]"""

import json
import sys
import urllib.error
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

request = {
    "messages": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "What is the capital of Japan?"},
    ],
    "temperature": 0,
    "max_tokens": 32,
}
call = urllib.request.Request(
    f"{URL}/v1/chat/completions", json.dumps(request).encode(), {"Content-Type": "application/json"}
)
try:
    with urllib.request.urlopen(call) as response:
        answer = json.load(response)
except urllib.error.HTTPError as error:
    # Errors have OpenAI's shape; `param` names the field that is to blame.
    problem = json.load(error)["error"]
    sys.exit(f"{error.code}: {problem['message']} (param: {problem['param']})")

print(answer["choices"][0]["message"]["content"])
print(f"({answer['usage']['completion_tokens']} tokens, finish_reason: {answer['choices'][0]['finish_reason']})")
