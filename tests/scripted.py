"""A model that says exactly what a test needs, as a real checkpoint and as a fake engine.

``says`` registers what follows a marker. The model is a Markov chain: the logits after token ``t`` are the row
``logits[t]``, so greedy text and all log probabilities are known in closed form.

    model = ScriptedModel()
    hello = model.says("hello", "He", "llo", "<|eos|>")     # pieces: each becomes one token
    api = Api(model.fake())                                 # milliseconds: endpoints over a fake engine
    answer = await api.chat(hello)                          # the marker is the end of the prompt
    Server("--model", str(model.checkpoint(folder)))        # seconds: the whole server on real weights

The weights: one layer that adds nothing (``o_proj`` and ``down_proj`` are zero), hidden size = vocabulary, so that
``embed_tokens = sqrt(size) I`` passes the norm unchanged and ``lm_head[j, t] = logits[t][j] / sqrt(size)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from api.config import ServerConfig
from api.model.tokenizer import Tokenizer
from engine_core.messages import ResolvedParams
from tests.fakes import FakeServer, byte_spelling

SIZE = 512
"""Width of the model and of its vocabulary."""
EOS = "<|eos|>"
LIKELY = 20.0
"""Logit of the token that a script says next; the others have 0."""

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if tools %}{# so that the template knows tools #}{% endif %}"
)

Piece = str | bytes


class ScriptedModel:
    """Collects scripts, then becomes a checkpoint or a fake server."""

    def __init__(
        self,
        *,
        special: Sequence[str] = (),
        eos: str = EOS,
        eos_is_special: bool = True,
        chat_template: str = CHAT_TEMPLATE,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        """Begins with a vocabulary of all bytes and the end token.

        Args:
            special: Texts that are special tokens.
            eos: The text of the end token.
            eos_is_special: Whether it is left out of texts as a special token.
            chat_template: Jinja source. By default the last message's content ends the prompt.
            generation_config: More of the model's defaults.
        """
        self.chat_template = chat_template
        self.generation_config = generation_config or {}
        self._added: dict[str, AddedToken] = {}
        self.logits = np.zeros((SIZE, SIZE), np.float32)
        self._next: dict[int, int] = {}
        for text in special:
            self._add(text, special=True)
        self.eos = self._add(eos, special=eos_is_special)

    def _add(self, text: str, *, special: bool = False) -> int:
        if text not in self._added:
            assert 256 + len(self._added) < SIZE, "the vocabulary is full"
            self._added[text] = AddedToken(text, special=special, normalized=False)
        return 256 + list(self._added).index(text)

    def token(self, piece: Piece) -> int:
        """The id of a piece, which becomes a token if it is none yet: a text, or one byte of a character."""
        if isinstance(piece, bytes):
            (byte,) = piece
            return byte
        if len(piece) == 1 and piece.isascii() and piece not in self._added:
            return ord(piece)
        return self._add(piece)

    def says(self, name: str, *pieces: Piece, after: Piece | None = None) -> str:
        """Registers a script.

        Args:
            name: Makes the marker.
            pieces: What the model says, a token each. The end token follows, unless the last piece is it.
            after: The last token of a prompt, instead of a marker.

        Returns:
            The marker: a prompt that ends with it is answered by the pieces.
        """
        marker = f"<say:{name}>"
        before = self._add(marker, special=True) if after is None else self.token(after)
        for piece in pieces:
            token = self.token(piece)
            assert self._next.setdefault(before, token) == token, f"another script goes on differently before {piece!r}"
            self.logits[before, token] = LIKELY
            before = token
        return marker

    def _finished(self) -> None:
        for token in range(SIZE):
            if token not in self._next:
                self._next[token] = self.eos
                self.logits[token, self.eos] = LIKELY

    def logprob(self, before: Piece, piece: Piece) -> float:
        """The log probability of a token after another."""
        self._finished()
        row = self.logits[self.token(before)].astype(np.float64)
        return float(row[self.token(piece)] - np.log(np.exp(row).sum()))

    def backend(self) -> tokenizers.Tokenizer:
        """Bytes without merges, and the pieces."""
        alphabet = byte_spelling()
        backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        for token in self._added.values():
            if token.special:
                backend.add_special_tokens([token])
            else:
                backend.add_tokens([token])
        return backend

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(
            self.backend(),
            special_tokens_map={},
            eos_token_ids=[self.eos],
            chat_template=self.chat_template,
        )

    def script(self, prompt: list[int], params: ResolvedParams) -> Iterator[int]:
        """What the fake engine says after a prompt."""
        token = prompt[-1]
        while True:
            token = self._next[token]
            yield token

    def fake(self, config: ServerConfig | None = None, *, tokens_per_step: int = 1) -> FakeServer:
        """The application over an engine that says the scripts. Scripts that are registered later are not known."""
        self._finished()
        server = FakeServer(
            config,
            self.script,
            generation_config=self.generation_config,
            chat_template=self.chat_template,
            tokenizer=self.tokenizer(),
            vocab_size=SIZE,
        )
        server.engine.tokens_per_step = tokens_per_step
        return server

    def checkpoint(self, folder: Path) -> Path:
        """Writes the model as transformers would; returns the folder."""
        import torch
        from safetensors.torch import save_file

        self._finished()
        folder.mkdir(parents=True, exist_ok=True)
        root = math.sqrt(SIZE)
        zeros = torch.zeros(SIZE, SIZE)
        layer = "model.layers.0."
        weights = {
            "model.embed_tokens.weight": torch.eye(SIZE) * root,
            "model.norm.weight": torch.ones(SIZE),
            "lm_head.weight": torch.from_numpy(self.logits.T / root).contiguous(),
            f"{layer}input_layernorm.weight": torch.ones(SIZE),
            f"{layer}post_attention_layernorm.weight": torch.ones(SIZE),
            **{f"{layer}self_attn.{name}_proj.weight": zeros.clone() for name in "qkvo"},
            f"{layer}mlp.gate_proj.weight": torch.zeros(32, SIZE),
            f"{layer}mlp.up_proj.weight": torch.zeros(32, SIZE),
            f"{layer}mlp.down_proj.weight": torch.zeros(SIZE, 32),
        }
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": SIZE,
            "hidden_size": SIZE,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "eos_token_id": self.eos,
        }
        self.backend().save(str(folder / "tokenizer.json"))
        _write(folder / "config.json", config)
        _write(folder / "generation_config.json", {"eos_token_id": self.eos, **self.generation_config})
        _write(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.chat_template},
        )
        return folder


def spelled(text: str) -> Iterable[bytes]:
    """A text as one piece a byte."""
    return [bytes([byte]) for byte in text.encode()]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
