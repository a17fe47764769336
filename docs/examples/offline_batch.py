"""Completes many prompts in one process, without a server: python offline_batch.py [MODEL]"""

import sys

from octavo import LLM, SamplingParams


def main() -> None:
    prompts = ["The capital of France is", "The opposite of hot is", "One, two, three,"]
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(sys.argv[1] if len(sys.argv) > 1 else "", max_model_len=1024) as llm:
        for output in llm.generate(prompts, params, use_tqdm=False):
            print(repr(output.prompt), "->", repr(output.outputs[0].text))


if __name__ == "__main__":  # LLM starts processes
    main()
