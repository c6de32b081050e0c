"""Write loramix/data/layers/*.json.gz: the linear and convolution layers of each known family, by name and weight shape.

Every model is built on the meta device from its published settings: no weight is downloaded or allocated.
Run it as `python tools/layer_tables.py`; the test of the reader compares its answer with the files.
"""
import gzip
import json
from pathlib import Path

import torch

UNETS = dict(
    sd1=dict(cross_attention_dim=768, attention_head_dim=8),
    sd2=dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True),
    sdxl=dict(
        cross_attention_dim=2048, attention_head_dim=[5, 10, 20], use_linear_projection=True, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=[1, 2, 10],
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816),
)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
OPEN_CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
OPEN_CLIP_BIG_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
ENCODERS = dict(sd1=[CLIP_L], sd2=[OPEN_CLIP_H], sdxl=[CLIP_L, OPEN_CLIP_BIG_G], flux=[CLIP_L])


def layers(model):
    "Name and weight shape of every linear and 2-D convolution layer, in the model's own order."
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: list(module.weight.shape) for name, module in model.named_modules() if isinstance(module, kinds)}


def text_layers(settings):
    "The layers of a CLIP text encoder, always with `text_model.` in front of the transformer's own."
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    kind = CLIPTextModelWithProjection if "projection_dim" in settings else CLIPTextModel
    found = layers(kind(CLIPTextConfig(**settings)))
    return {name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": shape for name, shape in found.items()}


def tables():
    "family -> component -> layer name -> weight shape."
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel
    with torch.device("meta"):
        out = {family: {"unet": layers(UNet2DConditionModel(**settings))} for family, settings in UNETS.items()}
        out["flux"] = {"transformer": layers(FluxTransformer2DModel(guidance_embeds=True))}
        for family, encoders in ENCODERS.items():
            for name, settings in zip(("text_encoder", "text_encoder_2"), encoders): out[family][name] = text_layers(settings)
    return out


def packed(table):
    "The bytes of one family's file: the same table gives the same bytes."
    return gzip.compress(json.dumps(table, separators=(",", ":")).encode(), mtime=0)


def main():
    "Write one file per family."
    folder = Path(__file__).resolve().parent.parent/"loramix"/"data"/"layers"
    folder.mkdir(parents=True, exist_ok=True)
    for family, table in tables().items():
        data = packed(table)
        (folder/f"{family}.json.gz").write_bytes(data)
        print(family, {component: len(found) for component, found in table.items()}, len(data), "bytes")


if __name__ == "__main__": main()
