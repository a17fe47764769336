"""lm-eval's local-completions and local-chat-completions with tasks of local files: GSM8K, generated and by likelihood.

Likelihoods are what a server gets wrong in silence: lm-eval takes them from ``echo`` with ``logprobs``. Here they are
compared with the log probabilities of the prompt's tokens.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

NUM_QUESTIONS = 5

source = Path(os.environ.get("OCTAVO_TEST_DATA") or "nowhere") / "gsm8k_test.jsonl"
tokenizer = os.environ.get("OCTAVO_TOKENIZER", "")

GENERATE = """
task: local_gsm8k
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: 48}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOOSE = """
task: local_gsm8k_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def write_tasks(folder: Path) -> Path:
    tasks = folder / "lm_eval_tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows = [row for row in rows if "answer" in row][:NUM_QUESTIONS]
    for number, row in enumerate(rows):
        others = [rows[(number + offset) % len(rows)]["answer"] for offset in (1, 2, 3)]
        row["choices"], row["gold"] = [" " + answer for answer in (row["answer"], *others)], 0
    file = tasks / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "generate.yaml").write_text(GENERATE.format(file=file))
    (tasks / "choose.yaml").write_text(CHOOSE.format(file=file))
    return tasks


def evaluate(model: str, path: str, tasks: Path, names: list[str], **options: Any) -> dict[str, Any]:
    arguments = {
        "model": os.environ["OCTAVO_MODEL"],
        "base_url": os.environ["OPENAI_BASE_URL"] + path,
        "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_retries": 1,
        "max_length": 2048,
        **options,
    }
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=",".join(f"{key}={value}" for key, value in arguments.items()),
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=model == "local-chat-completions",
        log_samples=True,
        bootstrap_iters=0,
    )
    assert isinstance(results, dict)
    return results


if not source.is_file():
    print("OCTAVO_TEST_DATA does not name a folder with gsm8k_test.jsonl")
    sys.exit(77)
if not tokenizer:
    print("it needs the model's tokenizer: --tokenizer FOLDER")
    sys.exit(77)


def post(path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        os.environ["OCTAVO_URL"] + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def answer_to(prompt: str) -> str:
    """The server's own answer; it may be empty."""
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 48, "stop": ["Question:"]}
    return str(post("/v1/completions", body)["choices"][0]["text"])


def log_likelihood(context: str, continuation: str) -> float:
    """Of the tokens that the continuation adds to the context."""
    skipped = post("/tokenize", {"prompt": context})["count"]
    tokens = post("/tokenize", {"prompt": context + continuation})["tokens"]
    answer = post("/v1/completions", {"prompt": tokens, "prompt_logprobs": 0, "max_tokens": 1})
    columns = answer["choices"][0]["prompt_logprobs"]
    return float(sum(columns[place][str(tokens[place])]["logprob"] for place in range(skipped, len(tokens))))


tasks = write_tasks(Path(os.environ["OCTAVO_FOLDER"]))
num_compared = 0
for tokenized in (False, True):
    results = evaluate(
        "local-completions", "/completions", tasks, ["local_gsm8k", "local_gsm8k_choice"], tokenized_requests=tokenized
    )
    samples = results["samples"]["local_gsm8k"]
    assert len(samples) == NUM_QUESTIONS
    for sample in samples:
        assert sample["resps"][0][0].strip() == answer_to(sample["arguments"][0][0]).strip(), sample
    for sample in results["samples"]["local_gsm8k_choice"]:
        for (context, continuation), response in zip(sample["arguments"], sample["resps"], strict=True):
            (found, _), expected = response[0], log_likelihood(context, continuation)
            assert abs(found - expected) < 1e-2, (found, expected, context, continuation)
            num_compared += 1
chat = evaluate("local-chat-completions", "/chat/completions", tasks, ["local_gsm8k"])
assert all(sample["resps"][0][0].strip() for sample in chat["samples"]["local_gsm8k"])
print(f"lm-eval {importlib.metadata.version('lm-eval')}: {num_compared} likelihoods are right")
