#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: a model's load_lora_adapter does not find in a folder what the
# same model's save_lora_adapter has just written there, unless it is told the kind or the name.
#
# Guessed: the two are a pair. save_lora_adapter writes safetensors unless asked otherwise, and
# from_pretrained of the same class finds safetensors by itself.
# Seen: without `weight_name` or `use_safetensors` the folder is searched for a pickle,
# pytorch_lora_weights.bin, alone, and an OSError says that it is not there.
# Who loads from a folder names pytorch_lora_weights.safetensors.
#
# Output when this was written (diffusers 0.42.1, peft 0.21.2, torch 2.13.0+cpu, Python 3.11):
#     written: ['pytorch_lora_weights.safetensors']
#     by folder: OSError, no file named pytorch_lora_weights.bin
#     by folder and name: loaded
#     by folder, use_safetensors=True: loaded
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 peft==0.21.2

cat > "$folder/pair.py" <<'PYTHON'
import os
import sys

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def model():
    torch.manual_seed(0)
    return WanTransformer3DModel(**SIZES)


adapted = model()
adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
adapted.save_lora_adapter(sys.argv[1])
(name,) = written = os.listdir(sys.argv[1])
print(f"written: {written}")
for words, options in (
    ("by folder", {}),
    ("by folder and name", {"weight_name": name}),
    ("by folder, use_safetensors=True", {"use_safetensors": True}),
):
    try:
        model().load_lora_adapter(sys.argv[1], prefix=None, **options)
        print(f"{words}: loaded")
    except OSError as error:
        missing = "no file named pytorch_lora_weights.bin"
        print(f"{words}: OSError, {missing if missing in str(error) else error}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/pair.py" "$folder/adapter" 2> /dev/null)
echo "$seen"
wanted="written: ['pytorch_lora_weights.safetensors']
by folder: OSError, no file named pytorch_lora_weights.bin
by folder and name: loaded
by folder, use_safetensors=True: loaded"
if [[ $seen != "$wanted" ]]; then
    echo "diffusers behaves otherwise now: expected" >&2
    echo "$wanted" >&2
    exit 1
fi
echo "as described"
