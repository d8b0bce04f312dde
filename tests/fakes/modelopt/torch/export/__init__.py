import json
from pathlib import Path


def export_hf_checkpoint(model, export_dir):
    model.save_pretrained(export_dir)
    Path(export_dir, "hf_quant_config.json").write_text(json.dumps(model.fake_quantization))
