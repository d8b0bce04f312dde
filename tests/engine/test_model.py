"""What a model's config may ask for, and what is refused because it would give wrong tokens."""

from __future__ import annotations

import numpy as np
import pytest

from batchinfer.engine.model.source import ModelSource
from batchinfer.engine.model.spec import DecoderSpec
from batchinfer.engine.model.weights import GgufTensors
from batchinfer.errors import ModelError

CONFIG = dict(
    model_type="llama", vocab_size=10, hidden_size=64, intermediate_size=8, num_hidden_layers=4, num_attention_heads=4
)
QWEN = CONFIG | dict(model_type="qwen2", use_sliding_window=True, sliding_window=8)
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        (CONFIG | {"rope_parameters": {FULL: {"rope_type": "default"}}}, "differ between layers"),
        (CONFIG | {"num_key_value_heads": 3}, "4 attention heads of 16 over 3 KV heads"),
        (CONFIG | {"head_dim": 15}, "even head_dim"),
        (QWEN | {"max_window_layers": 2}, "on some layers only"),
        (QWEN | {"max_window_layers": 0, "layer_types": [FULL, SLIDING] * 2}, "on some layers only"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(config, message):
    with pytest.raises(ModelError, match=message):
        DecoderSpec.from_config(config)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),  # fewer layers than the default of max_window_layers
        ({"max_window_layers": 4}, None),
        ({"max_window_layers": 0}, 8),
        ({"layer_types": [SLIDING] * 4}, 8),
        ({"max_window_layers": 0, "layer_types": [FULL] * 4}, None),
        ({"max_window_layers": 0, "use_sliding_window": False}, None),
    ],
)
def test_qwen_slides_its_window_where_transformers_does(changes, window):
    assert DecoderSpec.from_config(QWEN | changes).window == window


@pytest.mark.parametrize("how", ["none", "frequencies", "linear"])
def test_a_gguf_file_with_scaled_rope_is_refused(tmp_path, how):
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    if how == "frequencies":
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if how == "linear" else gguf.RopeScalingType.NONE)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source, spec = ModelSource.resolve(str(file)), DecoderSpec.from_config(CONFIG)
    if how == "none":
        assert GgufTensors(source, spec).get("model.norm.weight").shape == (64,)
    else:
        with pytest.raises(ModelError, match="rope scaling in a GGUF file"):
            GgufTensors(source, spec)
