"""Time of scoring an SDXL-shaped pair on the CPU, and of planning 50 steps.

    python benchmarks/scoring.py [--repeats 5] [--rank 16] [--threads 2]

The pair has the 560 attention layers of SDXL's UNet at their true shapes and random numbers. Nothing is read from the cache."""
import argparse
import os
import statistics
import tempfile
import time

import torch

from loramix.lora import read_lora
from loramix.rules import est
from loramix.scores import score


def sdxl_attention_shapes():
    "{layer: (out, in)} of the 560 attention linears, from the architecture on the meta device."
    from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True,
            transformer_layers_per_block=(1, 2, 10), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    return {f"unet.{name}": tuple(module.weight.shape) for name, module in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))}


def random_lora(shapes, rank, seed):
    "A LoRA of these shapes, float16 as most files are."
    draw, state = torch.Generator().manual_seed(seed), {}
    for layer, (out, width) in shapes.items():
        state[f"{layer}.lora_A.weight"] = torch.randn(rank, width, generator=draw).half()
        state[f"{layer}.lora_B.weight"] = (torch.randn(out, rank, generator=draw)*.02).half()
    return read_lora(state)


def seconds(job, repeats):
    "(median, least, most) wall time of a job."
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        job(i)
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = sdxl_attention_shapes()
    pair = [random_lora(shapes, args.rank, seed) for seed in (1, 2)]
    print(f"{len(shapes)} layers, rank {args.rank}, {args.threads} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        def fresh(i):
            os.environ["LORAMIX_CACHE"] = f"{folder}/{time.perf_counter_ns()}"
            return score(*pair)
        rows = {"energy": lambda i: fresh(i), "L1 (and energy)": lambda i: fresh(i).abs_sum, "top-K (and energy)": lambda i: fresh(i).top_sum}
        scores = score(*pair)
        rows["planning 50 steps"] = lambda i: est(scores, 50, discrepancy=.3 + i/100)
        rows["planning 50 steps, soft"] = lambda i: est(scores, 50, discrepancy=.3 + i/100, temperature=.5)
        for name, job in rows.items():
            median, least, most = seconds(job, args.repeats if "top" not in name and "L1" not in name else min(args.repeats, 3))
            print(f"{name:26} median {median:8.4f} s   least {least:8.4f}   most {most:8.4f}")
