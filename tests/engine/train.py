"""Trains the small model in ``tests/engine/trained``: ``python -m tests.engine.train [FOLDER]``, half an hour.

Random weights have no outliers, and rounding them hurts no text: whether a quantisation keeps a model's quality shows
on a model that has learnt something. This Llama of 3 million parameters has read the docstrings of Python's standard
library, numpy and torch. Python's own manual, which builds calibrate and measure with, it has never seen.

Interrupted, or stopped after ``--minutes``, it goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TRAINED = Path(__file__).parent / "trained"
END = "<|end|>"
VOCABULARY, SEQUENCE, BATCH, STEPS = 2048, 256, 16, 1000
WARM_UP, COOL_DOWN = 30, 400  # steps of a rising and of a falling rate


def documents() -> Iterator[str]:
    """Docstrings of 200 characters and more, each once."""
    homes = [Path(sysconfig.get_paths()["stdlib"])]
    homes += [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
    seen = set()
    for home in homes:
        for file in sorted(home.rglob("*.py")):
            if {"site-packages", "test", "tests", "topics.py"} & set(file.relative_to(home).parts):
                continue
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError, RecursionError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= 200 and text not in seen:
                        seen.add(text)
                        yield text


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level pairs, as large models have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(folder: Path, minutes: float) -> bool:
    """Whether it is done."""
    state = folder / "training.pt"
    until = time.monotonic() + 60 * minutes
    texts = list(documents())
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_tokenizer(texts).save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [token for encoding in tokenizer.encode_batch(texts) for token in (*encoding.ids, 0)]
    rows = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)
    print(f"{len(texts):,} docstrings, {len(ids):,} tokens", flush=True)

    model = new_model()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, values in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        first = kept["step"]
    begun = time.monotonic()
    for step in range(first, STEPS):
        if time.monotonic() > until:
            kept = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            torch.save(kept, state)
            return False
        epoch, at = divmod(step * BATCH, len(rows) - BATCH)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        batch = rows[order[at : at + BATCH]]
        share = min(1.0, (step + 1) / WARM_UP, (STEPS - step) / COOL_DOWN)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0:
            speed = (step - first + 1) * BATCH * SEQUENCE / (time.monotonic() - begun)
            told = f"step {step}/{STEPS}: loss {loss.item():.3f}, perplexity {math.exp(loss.item()):.1f}"
            print(f"{told}, {speed:,.0f} tok/s", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    state.unlink(missing_ok=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=TRAINED)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after that long; run again to go on")
    options = parser.parse_args()
    done = train(options.folder, options.minutes)
    print(json.dumps({"done": done, "folder": str(options.folder)}))


if __name__ == "__main__":
    main()
