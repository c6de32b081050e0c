"A pair of random LoRAs over the 560 attention layers of SDXL's UNet, with small matrices: its plan is as large as a real one."
import torch

from loramix.scores import Scores, score

BLOCKS = [("down_blocks.1", 2, 2), ("down_blocks.2", 2, 10), ("mid_block", 1, 10), ("up_blocks.0", 3, 10), ("up_blocks.1", 3, 2)] # block, attentions, transformer blocks of each


def sdxl_layers() -> list:
    "The names of SDXL's attention layers, as diffusers has them."
    return [f"{block}.attentions.{a}.transformer_blocks.{t}.{attn}.{role}" for block, attentions, depth in BLOCKS
            for a in range(attentions) for t in range(depth) for attn in ("attn1", "attn2") for role in ("to_q", "to_k", "to_v", "to_out.0")]


def state(seed:int) -> dict:
    "A LoRA state dict whose layers differ in size as trained ones do."
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name in sdxl_layers():
        size = .1*torch.exp(.15*torch.randn(1, generator=draw))
        tensors[f"unet.{name}.lora_A.weight"] = size*torch.randn(4, 16, generator=draw)
        tensors[f"unet.{name}.lora_B.weight"] = size*torch.randn(16, 4, generator=draw)
    return tensors


def sdxl_scores() -> Scores:
    "The scores of such a pair."
    return score(state(1), state(2))
