"""The demo model in the formats that other engines read, all made from the same weights."""

from __future__ import annotations

import json
from pathlib import Path

from batchinfer.cache import make_folder
from batchinfer.engine.model.source import ModelSource

MODEL = "smollm2-135m-instruct"


def hugging_face(folder: Path) -> Path:
    """A Hugging Face folder with bfloat16 safetensors."""
    return folder if folder.is_dir() else make_folder(folder, _fill_hugging_face)


def int8(folder: Path, plain: Path) -> Path:
    """The same with INT8 linears, W8A8 as the compressed-tensors format has it: per channel, activations per token."""
    return folder if folder.is_dir() else make_folder(folder, lambda target: _fill_int8(target, plain))


def gguf(file: Path, form: str) -> Path:
    """A GGUF file for llama.cpp, its matrices in ``form``: BF16, or Q8_0 with a scale for 32 numbers."""
    if file.is_file():
        return file
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

    reader = GGUFReader(ModelSource.resolve(MODEL).gguf)
    partial = file.with_suffix(".partial")
    writer = GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name not in ("general.architecture", "general.file_type") and not field.name.startswith("GGUF."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    kind = GGMLQuantizationType[form]
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
        else:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(file)


def _fill_hugging_face(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = ModelSource.resolve(MODEL)
    loaded = AutoModelForCausalLM.from_pretrained(source.folder, gguf_file=source.gguf.name, dtype=torch.bfloat16)
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    fresh = type(loaded)(config).to(torch.bfloat16)  # one that came from a GGUF file refuses to be saved
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.folder, gguf_file=source.gguf.name).save_pretrained(folder)


def _fill_int8(folder: Path, plain: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[name.replace("weight", "weight_scale")] = scale.to(torch.bfloat16)
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in plain.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": kind | {"strategy": "channel", "dynamic": False},
        "input_activations": kind | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((plain / "config.json").read_text()) | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
