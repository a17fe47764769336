"""Answers a question about the text files of a folder, and names the files that the answer comes from.

    python rag.py [URL [FOLDER [QUESTION [EMBEDDINGS_URL]]]]

EMBEDDINGS_URL is a server whose model compares texts, if it is another one: an encoder such as all-MiniLM-L6-v2 finds
more than a generative model does.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

PIECE, OVERLAP, KEPT = 600, 100, 3
"""Characters of a piece of a file, those that it shares with the next, and pieces that the model reads."""

given = dict(enumerate(sys.argv))
URL = given.get(1, "http://127.0.0.1:8000")
FOLDER = Path(given.get(2, Path(__file__).parent))
QUESTION = given.get(3, "Which program streams an answer?")
EMBEDDINGS_URL = given.get(4, URL)


def post(url: str, body: dict[str, Any]) -> Any:
    call = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call) as response:
        return json.load(response)


def embed(texts: list[str]) -> list[list[float]]:
    """A vector of length 1 for each text."""
    vectors: list[list[float]] = []
    for begin in range(0, len(texts), 512):
        # A piece that is too long for the model is cut.
        body = {"input": texts[begin : begin + 512], "truncate_prompt_tokens": -1}
        vectors += [entry["embedding"] for entry in post(f"{EMBEDDINGS_URL}/v1/embeddings", body)["data"]]
    return vectors


pieces = []
for path in sorted(FOLDER.rglob("*")):
    if path.is_file() and path.suffix in (".md", ".py", ".rst", ".txt"):
        text = path.read_text(errors="replace")
        begins = range(0, max(1, len(text) - OVERLAP), PIECE - OVERLAP)
        texts_of_file = [text[begin : begin + PIECE] for begin in begins]
        pieces += [(path.relative_to(FOLDER), piece) for piece in texts_of_file if piece.strip()]  # files may be empty
if not pieces:
    sys.exit(f"{FOLDER} has no text files (.md, .py, .rst, .txt)")

question, *vectors = embed([QUESTION, *(text for _, text in pieces)])
scores = [sum(a * b for a, b in zip(question, vector, strict=True)) for vector in vectors]
best = sorted(range(len(pieces)), key=lambda place: -scores[place])[:KEPT]
texts = "\n\n".join(f"[{pieces[place][0]}]\n{pieces[place][1]}" for place in best)

messages = [
    {"role": "system", "content": f"Answer from these texts. Say so if they do not tell.\n\n{texts}"},
    {"role": "user", "content": QUESTION},
]
answer = post(f"{URL}/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 120})
print(answer["choices"][0]["message"]["content"])
print("sources:", ", ".join(dict.fromkeys(str(pieces[place][0]) for place in best)))
