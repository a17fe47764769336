"""Detokenising in pieces gives the text of decoding at once; stop strings are found wherever they are cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from api.model.tokenizer import Tokenizer
from api.text.detokenizer import IncrementalDetokenizer
from api.text.stop_strings import StopChecker

SENTENCES = [
    "Hello world, this is a test. Don't panic!",
    "Größe über naïve café, 日本語のテキスト 😀👩‍👩‍👧 done",
    "def f(x):\n    return x ** 2\n\n",
    "مرحبا мир здравствуй   spaces\tand tabs",
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<｜end｜>"],
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    backend.add_tokens([AddedToken("<tool>"), AddedToken("日本")])
    return backend


def sentencepiece(strip: int = 1) -> Backend:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁▁▁", "▁a", "a", "b", "é", "▁the", "日", "x▁y", "."]
    backend = Backend(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(content=" ", left=strip, right=0))
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<t▁>")])
    return backend


def gemma_like() -> Backend:
    return sentencepiece(strip=0)


def word_piece() -> Backend:
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "hello",
        "##s",
        "##ing",
        ".",
        ",",
        "'",
        "s",
        "##'",
        "do",
        "not",
        "n't",
        "!",
        "é",
    ]
    backend = Backend(models.WordPiece(vocab={word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    return backend


def unigram() -> Backend:
    vocab = [("<unk>", 0.0), ("▁", -1.0), ("▁a", -2.0), ("a", -2.0), ("▁▁", -3.0), ("b▁c", -3.0), ("日", -3.0)]
    backend = Backend(models.Unigram(vocab, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return backend


def word_suffix() -> Backend:
    vocab = {"a": 0, "b</w>": 1, "c</w>": 2, "d": 3, "</w>": 4}
    backend = Backend(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder()
    backend.add_special_tokens(["<s>"])
    return backend


def no_decoder() -> Backend:
    backend = Backend(models.WordLevel(vocab={"a": 0, "b": 1, "c": 2}, unk_token="a"))
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def byte_level_and_more() -> Backend:
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("Q", "q")])
    return backend


BUILDERS: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "gemma_like": gemma_like,
    "word_piece": word_piece,
    "unigram": unigram,
    "word_suffix": word_suffix,
    "no_decoder": no_decoder,
    "byte_level_and_more": byte_level_and_more,
}


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer(BUILDERS[name]())


@cache
def fragments(name: str) -> list[int]:
    """Ids of single bytes and of other tokens that have no text of their own."""
    tok = tokenizer(name)
    if tok.decoding.kind == "byte_fallback":
        return [3 + byte for byte in "é日😀".encode()] + [3 + 0xFF, 3 + 0xF0]
    return [i for i in range(tok.vocab_size) if "\ufffd" in tok.decode([i])] or list(range(tok.vocab_size))


def deltas(name: str, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer(name), prompt, skip)
    return [*(detokenizer.append(token_id) for token_id in ids), detokenizer.finish()]


def id_lists(name: str) -> st.SearchStrategy[list[int]]:
    any_id = st.integers(0, tokenizer(name).vocab_size + 2)  # the last few are unknown
    return st.lists(st.one_of(any_id, st.sampled_from(fragments(name))), max_size=16)


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=120, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_deltas_join_to_the_full_decode(name: str, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(id_lists(name))
    expected = tokenizer(name).backend.decode(ids, skip_special_tokens=skip)
    parts = deltas(name, ids, skip=skip)
    assert "".join(parts) == expected
    # Nothing is taken back: what is out at any time begins the text of the whole.
    detokenizer = IncrementalDetokenizer(tokenizer(name), (), skip)
    cut = data.draw(st.integers(0, len(ids)))
    assert detokenizer.extend(ids[:cut]) == "".join(parts[:cut])
    assert detokenizer.extend(ids[cut:]) + detokenizer.finish() == "".join(parts[cut:])


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "no_decoder"])
@settings(max_examples=80, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_the_prompt_is_context(name: str, data: st.DataObject, skip: bool) -> None:
    # Prompts of whole characters: those of broken ones have tests of their own.
    tok = tokenizer(name)
    whole = [i for i in range(tok.vocab_size) if "\ufffd" not in tok.decode([i], False)]
    if tok.decoding.kind == "byte_fallback":
        whole = [0, 1, 2, *range(259, tok.vocab_size)]
    prompt = data.draw(st.lists(st.sampled_from(whole), max_size=6))
    ids = data.draw(id_lists(name))
    before = tok.backend.decode(prompt, skip_special_tokens=skip)
    full = tok.backend.decode([*prompt, *ids], skip_special_tokens=skip)
    assert full.startswith(before)
    assert "".join(deltas(name, ids, prompt, skip)) == full[len(before) :]


def byte_ids(text: str) -> list[int]:
    return [tokenizer("sentencepiece").token_to_id(f"<0x{byte:02X}>") or 0 for byte in text.encode()]


def test_a_cut_character_is_held_back() -> None:
    tok = tokenizer("byte_level")
    ids = tok.encode("a😀b")
    assert "\ufffd" in tok.decode(ids[:2])
    assert [part for part in deltas("byte_level", ids) if part] == ["a", "😀", "b"]


@pytest.mark.parametrize("name", ["byte_level", "byte_level_and_more"])
def test_a_character_that_the_prompt_began_is_completed(name: str) -> None:
    tok = tokenizer("byte_level")
    lead, tail = ([i for i in range(3, 259) if tok.token_bytes(i) == bytes([byte])][0] for byte in "é".encode())
    assert tokenizer(name).decode([lead, tail]) == "é"
    assert "".join(deltas(name, [tail], [lead])) == "é"
    assert "".join(deltas(name, [lead, tail], tok.encode("日本語é"))) == "é"
    # If nothing completes it, its replacement character is the prompt's.
    assert "".join(deltas(name, tok.encode("a"), [lead])) == "a"
    assert "".join(deltas(name, [], [lead])) == ""
    # Half a surrogate is two wrong bytes to the backend, but a beginning to Python's decoder.
    half = [next(i for i in range(3, 259) if tok.token_bytes(i) == bytes([byte])) for byte in b"\xed\xb6"]
    assert tokenizer(name).decode(half) == "\ufffd\ufffd"
    assert "".join(deltas(name, half)) == "\ufffd\ufffd"
    assert "".join(deltas(name, tok.encode("a"), half)) == "a"


def test_byte_runs_are_judged_as_a_whole() -> None:
    e_acute, bad = byte_ids("é"), byte_ids("é") + [3 + 0xFF]
    (letter,) = (tokenizer("gemma_like").token_to_id("a"),)
    assert letter is not None
    assert deltas("gemma_like", [*e_acute, letter]) == ["", "", "éa", ""]
    assert deltas("gemma_like", [*bad, letter]) == ["", "", "", "\ufffd" * 3 + "a", ""]
    assert deltas("gemma_like", e_acute) == ["", "", "é"]
    # A character that the prompt began; and whole ones of the prompt are not repeated.
    assert "".join(deltas("gemma_like", [e_acute[1], letter], [e_acute[0]])) == "éa"
    assert "".join(deltas("gemma_like", [*e_acute, letter], e_acute * 3)) == "éa"


def test_leading_space() -> None:
    tok = tokenizer("sentencepiece")
    word, start = tok.token_to_id("▁the"), tok.token_to_id("<s>")
    assert word is not None
    assert start is not None
    assert "".join(deltas("sentencepiece", [word, word])) == "the the"
    assert "".join(deltas("sentencepiece", [word], [word])) == " the"
    assert "".join(deltas("sentencepiece", [word], [start])) == "the"
    assert "".join(deltas("sentencepiece", [word], [start], skip=False)) == " the"


def test_spaces_between_special_tokens() -> None:
    tok = tokenizer("no_decoder")
    first, second, word = tok.token_to_id("<s>"), tok.token_to_id("</s>"), 0
    assert first is not None
    assert second is not None
    ids = [first, second, word, word, first, second]
    apart = IncrementalDetokenizer(tok, (), False, True)
    assert apart.extend(ids) + apart.finish() == "<s> </s> a a <s> </s>"
    joined = IncrementalDetokenizer(tok, (), False, False)
    assert joined.extend(ids) + joined.finish() == "<s></s> a a <s></s>"


def test_the_window_of_the_generic_decoder_stays_small() -> None:
    tok = tokenizer("unigram")
    detokenizer = IncrementalDetokenizer(tok)
    ids = [2, 3, 1, 6] * 500
    assert detokenizer.extend(ids) + detokenizer.finish() == tok.decode(ids)


def test_a_decoder_that_rewrites_what_is_out_does_not_stall() -> None:
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("ab", "AB")])
    tok = Tokenizer(backend)
    a, b, c = (tok.token_to_id(char) or 0 for char in "abc")
    detokenizer = IncrementalDetokenizer(tok)
    assert [detokenizer.append(token_id) for token_id in (a, b, c, c)] == ["a", "B", "c", "c"]


@pytest.mark.parametrize("token_id", [-1, 1 << 31, 1 << 40, 1 << 70])
@pytest.mark.parametrize("name", BUILDERS)
def test_ids_of_no_vocabulary(name: str, token_id: int) -> None:
    assert "".join(deltas(name, [token_id, token_id], [token_id])) == ""
    assert tokenizer(name).token_bytes(token_id) == b""
    assert tokenizer(name).id_to_token(token_id) is None


@pytest.mark.parametrize("name", ["byte_level", "gemma_like"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_token_bytes_join_to_the_text(name: str, text: str) -> None:
    tok = tokenizer(name)
    ids = tok.encode(text, add_special_tokens=False)
    joined = b"".join(tok.token_bytes(token_id) for token_id in ids).decode()
    assert joined == tok.decode(ids, skip_special_tokens=False)


# Stop strings


def naive_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the match ends that ends first, the longest one of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def feed_all(checker: StopChecker, pieces: Sequence[str]) -> tuple[str, str | None]:
    out = []
    for piece in pieces:
        text, matched = checker.feed(piece)
        out.append(text)
        if matched is not None:
            return "".join(out), matched
    return "".join(out) + checker.finish(), None


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab\n", max_size=24),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 24), max_size=8),
    include=st.booleans(),
)
def test_stop_strings_against_a_naive_search(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    emitted, matched = feed_all(StopChecker(stops, include), pieces)
    expected = naive_stop(text, stops)
    if expected is None:
        assert (emitted, matched) == (text, None)
    else:
        end, stop = expected
        assert (emitted, matched) == (text[:end] if include else text[: end - len(stop)], stop)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=16), stops=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_only_a_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    emitted = ""
    for index, char in enumerate(text):
        out, matched = checker.feed(char)
        emitted += out
        if matched is not None:
            return
        seen = text[: index + 1]
        prefixes = [stop[:size] for stop in stops for size in range(1, len(stop)) if seen.endswith(stop[:size])]
        held = max(map(len, prefixes), default=0)
        assert emitted == seen[: len(seen) - held]


def test_after_a_match_nothing_follows() -> None:
    checker = StopChecker(["stop"])
    assert checker.feed("a st") == ("a ", None)
    assert checker.feed("op b") == ("", "stop")
    assert checker.feed("c") == ("", "stop")
    assert checker.matched == "stop"
    assert checker.finish() == ""


def test_no_stop_strings() -> None:
    checker = StopChecker([])
    assert checker.feed("abc") == ("abc", None)
    assert checker.finish() == ""
    with pytest.raises(ValueError, match="empty"):
        StopChecker(["a", ""])


@pytest.mark.parametrize(
    "stops", [["a" * 5000 + "b"], ["a" * size + "b" for size in range(1, 60)], ["]", "^", "\\", "-a"]]
)
def test_hostile_stop_strings_are_linear(stops: list[str]) -> None:
    checker = StopChecker(stops)
    emitted = "".join(checker.feed("a")[0] for _ in range(20000)) + checker.finish()
    assert emitted == "a" * 20000
