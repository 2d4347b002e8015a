"""The words of shapes-video: a word-level tokenizer over the caption grammar, and a small UMT5 encoder."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .scene import vocabulary

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Splits text into lower-case words of the grammar, ignores digits and punctuation, and ends with `</s>`."""
    words = (PAD, END, UNKNOWN, *vocabulary())
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z]+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, words.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )


def build_text_encoder(width: int, layers: int) -> UMT5EncoderModel:
    """An untrained UMT5 encoder for that tokenizer."""
    config = UMT5Config(
        vocab_size=3 + len(vocabulary()),
        d_model=width,
        d_kv=32,
        num_heads=width // 32,
        d_ff=2 * width,
        num_layers=layers,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)
