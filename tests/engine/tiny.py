"""Tiny random models of each family, saved as Hugging Face folders with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto import CONFIG_MAPPING

VOCAB = 320
EOS = 257
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,  # far from ties, so that greedy choices are stable
    bos_token_id=256,
    eos_token_id=EOS,
    pad_token_id=EOS,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# name → (model_type, what differs from the base)
VARIANTS = {
    "llama": ("llama", dict(tie_word_embeddings=False)),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama3-rope": ("llama", dict(rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False)),
    "llama-linear-rope-bias": (
        "llama",
        dict(
            rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0),
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "llama-wide-heads": ("llama", dict(head_dim=32, num_attention_heads=4, num_key_value_heads=4)),
    "mistral-window": ("mistral", dict(sliding_window=24, head_dim=16)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16, tie_word_embeddings=False)),
}


def make_model(folder: Path, variant: str, seed: int = 0) -> Path:
    """Write a random model of ``variant`` into ``folder`` and return it."""
    model_type, changes = VARIANTS[variant]
    config = CONFIG_MAPPING[model_type](**_BASE | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms start at 0 and 1, which would hide mistakes
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then <s>, </s> and some never used."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert fast.convert_tokens_to_ids("</s>") == EOS
    return fast
