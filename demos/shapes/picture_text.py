"""The words of shapes-image: a CLIP tokenizer in which every word of the captions is one token, and a small encoder."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .scene import vocabulary

START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_LENGTH = 40  # the longest caption has 30 tokens


def byte_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merge rules that make every word one token: the most frequent pair first, ties in alphabetical order."""
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    rules = []
    while any(len(word) > 1 for word in pieces):
        counts = Counter(pair for word in pieces for pair in pairwise(word))
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        rules.append((left, right))
        for word in pieces:
            for place in range(len(word) - 2, -1, -1):
                if word[place : place + 2] == [left, right]:
                    word[place : place + 2] = [left + right]
    return rules


def build_clip_tokenizer() -> CLIPTokenizer:
    """Words of the grammar are whole tokens; other words fall into pieces, as in any CLIP."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    merges = byte_pairs(vocabulary())
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END])
    vocab = {token: number for number, token in enumerate(tokens)}
    arguments: Any = {"vocab": vocab, "merges": merges}
    return CLIPTokenizer(**arguments, pad_token=END, model_max_length=TEXT_LENGTH)


def build_clip_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """An untrained CLIPTextModel for that tokenizer, `width` wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
