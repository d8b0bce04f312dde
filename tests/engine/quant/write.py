"""Writes the checkpoints in ``written``, with other tools: ``python -m tests.engine.quant.write [TOOL]``.

auto-round (``pip install auto-round``) rounds a small random Llama to 4 bits and writes it in AWQ's format and in
GPTQ's; ``plain`` has the numbers that it reads the first one as. llm-compressor (``pip install llmcompressor``, in an
environment of its own) searches AWQ's scales for the same Llama and writes ``searched``; ``said.json`` has what its own
model, with rounded weights, says to PROMPTS.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from tests.engine.tiny import EOS, VOCAB, make_tokenizer

WRITTEN = Path(__file__).parent / "written"
FORMATS = ("awq", "gptq")
BITS, GROUP_SIZE = 4, 32
PROMPTS = [[(7 * i * j + j) % 256 for j in range(12)] for i in range(1, 25)]
OUTPUT = 8  # tokens that each is answered with


def make_model(folder: Path) -> None:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=EOS,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write(model: Path, form: str, scratch: Path) -> None:
    from auto_round import AutoRound

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tool = AutoRound(loaded, tokenizer, bits=BITS, group_size=GROUP_SIZE, sym=False, iters=0, device_map="cpu")
    tool.quantize_and_save(str(scratch / form), format=f"auto_{form}")
    [made] = (scratch / form).rglob("model.safetensors")
    (WRITTEN / form).mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(made.with_name(file), WRITTEN / form / file)


def write_plain() -> None:
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    tensors = load_file(WRITTEN / "awq" / "model.safetensors")
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = [tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
        tensors[f"{name}.weight"] = dequantize_gemm(*parts, BITS, GROUP_SIZE).T.contiguous()
    config = json.loads((WRITTEN / "awq" / "config.json").read_text())
    del config["quantization_config"]
    (WRITTEN / "plain").mkdir(exist_ok=True)
    (WRITTEN / "plain" / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, WRITTEN / "plain" / "model.safetensors", {"format": "pt"})


def write_searched(model: Path) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    rows, length = 32, 64
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    seen = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length] * rows})
    weights = QuantizationArgs(num_bits=BITS, symmetric=False, strategy="group", group_size=GROUP_SIZE)
    group = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = [AWQModifier(), QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    torch.Tensor.pin_memory = lambda tensor: tensor  # which it asks for where there is no GPU, too
    tokenizer = AutoTokenizer.from_pretrained(model)
    oneshot(
        model=loaded,
        dataset=seen,
        recipe=recipe,
        num_calibration_samples=rows,
        max_seq_length=length,
        processor=tokenizer,
    )
    greedy = dict(max_new_tokens=OUTPUT, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompts = torch.tensor(PROMPTS)
    said = loaded.generate(prompts, attention_mask=torch.ones_like(prompts), **greedy)[:, prompts.shape[1] :].tolist()
    folder = WRITTEN / "searched"
    loaded.save_pretrained(folder, save_compressed=True)
    for other in {*folder.iterdir()} - {folder / "config.json", folder / "model.safetensors"}:
        other.unlink()
    (folder / "said.json").write_text(json.dumps(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tool", nargs="?", choices=["auto-round", "llmcompressor"], default="auto-round")
    tool = parser.parse_args().tool
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model")
        if tool == "llmcompressor":
            return write_searched(scratch / "model")
        for form in FORMATS:
            write(scratch / "model", form, scratch)
    write_plain()


if __name__ == "__main__":
    main()
