"""What a mix costs: the time of one picture against one merged LoRA, and the memory on top of the pipeline.

    python benchmarks/fusion_speed.py [--model small|sdxl] [--pairs 30] [--steps 20] [--device cpu|cuda] [--tolerance 0] [--turn picture|step]

Pictures come in interleaved rounds, in an order drawn anew each time. With `--turn step` the pictures of a round are made side by side, a step of each in turn, and a picture's time
is the sum of its own turns: where one picture takes a minute, a neighbour who wakes up then slows all arms alike. The arms: a LoRA merged by `fuse_lora`, the same again (A/A: what the clock itself is worth), a hard plan,
a soft plan, soft EST. The hard plan lets every layer go over from the subject to the style once, at a step of its own; the soft one changes every layer at every step, which
is the most that a plan can ask for; `est` is the plan that `loramix.mix(…, rule="est", temperature=0.5)` makes of the two LoRAs, at the tolerance that `mix` has by itself. Ratios are of summed times over rounds, with a bootstrap over rounds; the bound is one-sided, 95 %.

small: the pipeline that ships with loramix (random weights of its shape where it is not there); sdxl: the true shapes of the SDXL UNet, random bfloat16 weights, 256 pixels."""
import argparse, dataclasses, gc, inspect, random, resource, statistics, time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

import loramix
from loramix.fusion import fuse
from loramix.lora import read_lora
from loramix.plan import make_plan

MIX_TOLERANCE = inspect.signature(loramix.mix).parameters["tolerance"].default
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def small_unet():
    "The small world's UNet, with random weights."
    levels = 3
    return UNet2DConditionModel(sample_size=16, in_channels=6, out_channels=6, block_out_channels=(48, 96, 96), layers_per_block=1, norm_num_groups=16, cross_attention_dim=128,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",)*levels, up_block_types=("CrossAttnUpBlock2D",)*levels)


def sdxl_unet(dtype=torch.bfloat16):
    "The UNet of SDXL, with random weights; made without a float32 copy."
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
    unet = unet.to(dtype).to_empty(device="cpu")
    for name, parameter in unet.named_parameters():
        if parameter.dim() < 2: parameter.data.fill_(1. if name.endswith("weight") else 0.)
        else: parameter.data.uniform_(-1, 1).mul_(parameter[0].numel()**-0.5)
    return unet


def build(model, device):
    "A pipeline without text encoder and VAE, and the arguments of a run."
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    none = dict(vae=None, text_encoder=None, tokenizer=None)
    draw = torch.Generator().manual_seed(0)
    if model == "small":
        shipped = Path(loramix.__file__).parent/"data"/"pipeline"/"unet"
        unet = UNet2DConditionModel.from_pretrained(shipped, local_files_only=True).float() if shipped.exists() else small_unet()
        pipe = StableDiffusionPipeline(unet=unet, scheduler=DDIMScheduler(**noise), safety_checker=None, feature_extractor=None, requires_safety_checker=False, **none)
        side, channels, text = unet.config.sample_size, unet.config.in_channels, torch.randn(1, 16, unet.config.cross_attention_dim, generator=draw)
        run = dict(prompt_embeds=text, negative_prompt_embeds=0*text, guidance_scale=3., height=8*side, width=8*side)
    else:
        shipped, unet = None, sdxl_unet()
        pipe = StableDiffusionXLPipeline(unet=unet, scheduler=DDIMScheduler(**noise), text_encoder_2=None, tokenizer_2=None, add_watermarker=False, **none)
        side, channels, text, pooled = 32, 4, torch.randn(1, 77, 2048, generator=draw).bfloat16(), torch.randn(1, 1280, generator=draw).bfloat16()
        run = dict(prompt_embeds=text, negative_prompt_embeds=0*text, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=0*pooled, guidance_scale=5., height=256, width=256)
    unet.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, channels, side, side, generator=draw).to(unet.dtype)
    what = f"{model}: {sum(p.numel() for p in unet.parameters())/1e6:.1f} M weights, {str(unet.dtype)[6:]}, " + ("as shipped" if shipped and shipped.exists() else "random")
    return pipe.to(device), {key: value.to(device) if torch.is_tensor(value) else value for key, value in dict(run, latents=latents, output_type="latent").items()}, what


def lora_state(unet, seed, rank, dtype):
    "A random LoRA over the attention layers, alpha = rank."
    draw, state = torch.Generator().manual_seed(seed), {}
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(ATTENTION):
            state[f"unet.{name}.lora_A.weight"] = (0.02*torch.randn(rank, layer.in_features, generator=draw)).to(dtype)
            large = 0.02*torch.randn((), generator=draw).mul(0.3).exp()                       # layers differ in energy, as in files from training
            state[f"unet.{name}.lora_B.weight"] = (large*torch.randn(layer.out_features, rank, generator=draw)).to(dtype)
    return state


def plan_of(kind, scores, steps):
    "The plan of a kind: hard, soft or est."
    if kind == "est": return loramix.est(scores, steps, discrepancy=0.5, temperature=0.5)
    layers = len(scores.layers)
    if kind == "hard": share = (torch.arange(steps)[:, None] >= torch.randint(1, max(steps, 2), (layers,), generator=torch.Generator().manual_seed(0))).float()
    else: share = torch.linspace(0.1, 0.9, steps)[:, None] + 0.1*torch.rand(1, layers, generator=torch.Generator().manual_seed(1))
    return make_plan(torch.stack([1 - share, share], -1), scores.layers, scores.loras, scores.roles, {"name": kind})


def timed(pipe, run, steps, device):
    "Seconds of one picture: on the clock, and of processor time."
    gc.disable()
    if device == "cuda": torch.cuda.synchronize()
    clock, work = time.perf_counter(), time.process_time()
    pipe(num_inference_steps=steps, **run)
    if device == "cuda": torch.cuda.synchronize()
    clock, work = time.perf_counter() - clock, time.process_time() - work
    gc.enable()
    return clock, work


def timed_in_turn(pipes, run, steps, device, draw):
    "{name: [(seconds on the clock, of processor time), …]}, a pair for each step and for what follows the last: every pipeline makes one picture, a step of each in turn."
    from greenlet import greenlet, getcurrent                       # one thread, so that the arms share the pool of workers and no other waits beside it
    main, spent = getcurrent(), {name: [] for name in pipes}
    def pause(pipe, step, t, values):
        if device == "cuda": torch.cuda.synchronize()
        main.switch()
        return values
    turns = {name: greenlet(lambda pipe=pipe: pipe(num_inference_steps=steps, callback_on_step_end=pause, **run)) for name, pipe in pipes.items()}
    gc.disable()
    with torch.no_grad():                                           # held over all turns: a pipeline that ends must not switch gradients on for the others
        while any(not turn.dead for turn in turns.values()):
            names = [name for name, turn in turns.items() if not turn.dead]
            draw.shuffle(names)
            for name in names:
                clock, work = time.perf_counter(), time.process_time()
                turns[name].switch()
                if device == "cuda": torch.cuda.synchronize()
                spent[name].append((time.perf_counter() - clock, time.process_time() - work))
    gc.enable()
    return spent


def bound(over, under, rounds=4000, seed=0):
    "(ratio of sums, its upper 95 % bound, its median over pairs)"
    draw, pairs = random.Random(seed), list(zip(over, under))
    ratios = sorted(sum(a for a, _ in sample)/sum(b for _, b in sample) for sample in (draw.choices(pairs, k=len(pairs)) for _ in range(rounds)))
    return sum(over)/sum(under), ratios[int(0.95*rounds)], statistics.median(a/b for a, b in pairs)


def nbytes(tensors): return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def memory(fusion, loras):
    "Bytes that a fusion keeps: (copies of weights, factors that are not the LoRAs' own tensors, the LoRAs, one scratch)."
    sites = fusion.editor.sites
    own = {t.untyped_storage().data_ptr() for lora in loras for u in lora.layers.values() for t in (u.up, u.down)}
    factors = [t for site in sites for f in site.factors if f for t in f[:2] if t.untyped_storage().data_ptr() not in own]
    saved = [site.saved for site in sites if site.saved is not None]
    own_room = fusion.editor.scratch
    scratch = max((len(chunk)*sites[chunk[0]].weight.numel()*4 for chunk in fusion.editor.chunks), default=0) if own_room is None else own_room.numel()*own_room.element_size()
    return nbytes(saved), nbytes(factors), nbytes([t for lora in loras for u in lora.layers.values() for t in (u.up, u.down)]), scratch


def main(args):
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    pipe, run, what = build(args.model, args.device)
    dtype = pipe.unet.dtype
    states = {name: lora_state(pipe.unet, seed, args.rank, dtype) for seed, name in enumerate(("subject", "style"))}
    loras = [dataclasses.replace(read_lora(state), name=name) for name, state in states.items()]
    scores = loramix.score(*loras)
    merged, _, _ = build(args.model, args.device)
    merged.load_lora_weights(dict(states["subject"]), adapter_name="subject")
    merged.fuse_lora(); merged.unload_lora_weights()
    again = type(merged)(**merged.components)                       # the same weights, with a scheduler of its own
    again.scheduler = DDIMScheduler.from_config(merged.scheduler.config)
    again.set_progress_bar_config(disable=True)
    print(f"{what}; {len(scores.layers)} layers of rank {args.rank}; {args.steps} steps; {args.pairs} rounds by {args.turn}; {args.device}, {args.threads} threads, torch {torch.__version__}", flush=True)

    results, notes = {}, []
    for kind in args.plans:
        gc.collect()
        if args.device == "cuda": torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated()
        fusion = fuse(pipe, lambda steps: plan_of(kind, scores, steps), loras, tolerance=MIX_TOLERANCE if kind == "est" else args.tolerance, backup=args.backup)
        arms = {"merged": merged, "again": again, "mix": pipe} if kind == args.plans[0] or args.model == "small" else {"merged": merged, "mix": pipe}    # one A/A is enough where a picture takes a minute
        times = {name: [] for name in arms}
        for name, arm in arms.items(): timed(arm, run, args.steps if args.model == "small" else 2, args.device)                          # warm up
        order, draw, before = list(arms), random.Random(1), fusion.changes
        for _ in range(args.pairs):
            if args.turn == "step": took = {name: tuple(map(sum, zip(*turns))) for name, turns in timed_in_turn(arms, run, args.steps, args.device, draw).items()}
            else:
                draw.shuffle(order)
                took = {name: timed(arms[name], run, args.steps, args.device) for name in order}
            for name in order: times[name].append(took[name])
            if args.model == "sdxl": print(f"    {kind} " + ", ".join(f"{name} {took[name][0]:.2f} s" for name in arms), flush=True)
        edits = (fusion.changes - before)/args.pairs
        copies, factors, files, scratch = memory(fusion, loras)
        notes.append(f"{kind}: {edits:.0f} layer edits a picture; memory: copies {copies/2**20:.1f} MiB, factors beyond the LoRAs' own {factors/2**20:.1f} MiB "
            f"(LoRAs {files/2**20:.1f} MiB), scratch {scratch/2**20:.1f} MiB" + (f", GPU peak of the mix {(torch.cuda.max_memory_allocated() - base)/2**20:.0f} MiB" if args.device == "cuda" else ""))
        results[kind] = times
        fusion.remove()

    print(f"\n{'plan':6} {'measure':10} {'merged s':>9} {'mix s':>9} {'ratio':>7} {'≤ 95 %':>7} {'median':>7}   {'A/A':>7} {'≤ 95 %':>7}")
    for name, times in results.items():
        for i, measure in enumerate(("clock", "processor")):
            a, b = ([t[i] for t in times[arm]] for arm in ("merged", "mix"))
            same = "   {:7.4f} {:7.4f}".format(*bound([t[i] for t in times["again"]], a)[:2]) if "again" in times else ""
            print("{:6} {:10} {:9.4f} {:9.4f} {:7.4f} {:7.4f} {:7.4f}".format(name, measure, sum(a)/len(a), sum(b)/len(b), *bound(b, a)) + same, flush=True)
    print("\n" + "\n".join(notes) + f"\nlargest resident set {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20:.2f} GiB (two pipelines)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", "sdxl"), default="small")
    parser.add_argument("--plans", nargs="+", choices=("hard", "soft", "est"), default=["hard", "soft", "est"])
    parser.add_argument("--pairs", type=int, default=30, help="rounds: one picture of each kind in each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turn", choices=("picture", "step"), default="picture", help="what comes interleaved: whole pictures, or their steps (needs greenlet)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0., help="of the plans hard and soft (0: every change is carried out)")
    parser.add_argument("--backup", choices=("device", "cpu"), default="device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    main(parser.parse_args())
