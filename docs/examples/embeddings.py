"""Orders texts by how similar they are to a question: python embeddings.py [URL]"""

import json
import sys
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"

TEXTS = [
    "How do I bake bread?",
    "Mix flour, water, salt and yeast, let the dough rise, and bake it.",
    "The train to Berlin leaves at nine.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
]

call = urllib.request.Request(
    f"{URL}/v1/embeddings", json.dumps({"input": TEXTS}).encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(call) as response:
    question, *others = (entry["embedding"] for entry in json.load(response)["data"])

# Vectors have length 1, so that their product is the cosine of the angle between them.
scores = [sum(a * b for a, b in zip(question, other, strict=True)) for other in others]
print(TEXTS[0])
for score, text in sorted(zip(scores, TEXTS[1:], strict=True), reverse=True):
    print(f"{score:6.3f}  {text}")
