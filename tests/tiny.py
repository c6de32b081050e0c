"""Random pipelines of every class, small enough for a test: the true classes, nothing downloaded.

    from tiny import sd, sdxl, flux, lora_state, load
    pipe = sd()                                   # StableDiffusionPipeline with tokenizer, text encoder, VAE, UNet
    state = lora_state(pipe, seed=1)              # a LoRA state dict as a file would hold it
"""
import functools, json, logging, tempfile, warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from diffusers import (AutoencoderKL, ControlNetModel, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline,
    FluxTransformer2DModel, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1)


def byte_letters():
    "The 256 letters that byte-level BPE writes bytes with: printable ones for themselves, the rest from 256 on."
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


@functools.lru_cache
def clip_tokenizer(length=16):
    "A CLIPTokenizer over single bytes, without merges."
    letters = byte_letters()
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"model_max_length": length, "tokenizer_class": "CLIPTokenizer"}))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def t5_tokenizer(length=16):
    "A fast T5-style tokenizer over a few letters."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length)


def clip_text(width=16, length=16, projection=None, act="quick_gelu"):
    "A CLIP text encoder with two layers."
    config = CLIPTextConfig(vocab_size=514, hidden_size=width, intermediate_size=2*width, num_hidden_layers=2, num_attention_heads=2, hidden_act=act,
        max_position_embeddings=length, bos_token_id=512, eos_token_id=513, pad_token_id=513, projection_dim=projection or width)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae(latent=4, **extra):
    "A VAE that halves the sides once."
    return AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",)*2, up_block_types=("UpDecoderBlock2D",)*2,
        layers_per_block=1, latent_channels=latent, norm_num_groups=4, sample_size=16, **extra)


def _seeded(build):
    "Weights from the seed, whatever was drawn before; no training, no gradients, no bar."
    @functools.wraps(build)
    def wrapped(*, seed=0, dtype=torch.float32, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipe = build(**kwargs)
        for part in pipe.components.values():
            if isinstance(part, nn.Module): (part if dtype == torch.float32 else part.to(dtype)).eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    return wrapped


UNET = dict(sample_size=8, layers_per_block=1, norm_num_groups=4)


@_seeded
def sd(scheduler=None, kind=StableDiffusionPipeline, in_channels=4, **extra):
    "Stable Diffusion 1.5's shape: cross attention to one text encoder."
    unet = UNet2DConditionModel(in_channels=in_channels, out_channels=4, block_out_channels=(8, 16), cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **UNET)
    return kind(vae=vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=unet, scheduler=scheduler or DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **extra)


def controlnet(unet):
    "A ControlNet for a UNet of `sd`, with weights that do something."
    with torch.random.fork_rng():
        torch.manual_seed(9)
        net = ControlNetModel.from_unet(unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 16))
        for parameter in net.parameters(): parameter.data.add_(0.05*torch.randn_like(parameter))
    return net.eval().requires_grad_(False)


@_seeded
def sdxl(scheduler=None, kind=StableDiffusionXLPipeline, **extra):
    "Stable Diffusion XL's shape: two text encoders, pooled embedding and sizes in the time embedding."
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, block_out_channels=(8, 16), cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6*8 + 16, **UNET)
    return kind(vae=vae(), text_encoder=clip_text(), text_encoder_2=clip_text(projection=16, act="gelu"), tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), unet=unet,
        scheduler=scheduler or EulerDiscreteScheduler(**NOISE), add_watermarker=False, **extra)


@_seeded
def flux(scheduler=None, kind=FluxPipeline, **extra):
    "FLUX's shape: double and single transformer blocks, flow matching, CLIP and T5."
    transformer = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=False)
    t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    return kind(vae=vae(shift_factor=0.1), text_encoder=clip_text(), text_encoder_2=t5, tokenizer=clip_tokenizer(), tokenizer_2=t5_tokenizer(), transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), **extra)


def denoiser(pipe):
    "(component name, module)"
    name = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
    return name, getattr(pipe, name)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = (*ATTENTION, "ff.net.2", "proj_in", "conv1")        # linear, 1 × 1 and 3 × 3 convolutions
BUILD = dict(sd=sd, sdxl=sdxl, flux=flux)


def lora_state(pipe, seed=1, rank=2, size=0.2, layers=ATTENTION, text=False, dtype=torch.float32):
    "A LoRA state dict in diffusers' names, over all layers of the denoiser whose names end so, and if asked the text encoders'. (alpha = rank)"
    draw = torch.Generator().manual_seed(seed)
    state = {}
    def add(prefix, module):
        weight = module.weight
        shape = (rank, weight.shape[1], *weight.shape[2:])
        state[f"{prefix}.lora_A.weight"] = (torch.randn(*shape, generator=draw)*size).to(dtype)
        state[f"{prefix}.lora_B.weight"] = (torch.randn(weight.shape[0], rank, *[1]*(weight.dim() - 2), generator=draw)*size).to(dtype)
    component, module = denoiser(pipe)
    for name, layer in module.named_modules():
        if name.endswith(tuple(layers)) and isinstance(layer, (nn.Linear, nn.Conv2d)): add(f"{component}.{name}", layer)
    for part in ("text_encoder", "text_encoder_2") if text else ():
        encoder = getattr(pipe, part, None)
        if encoder is None or "CLIP" not in type(encoder).__name__: continue
        for name, layer in encoder.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "out_proj")):
                add(f"{part}." + (name if name.startswith("text_model.") else f"text_model.{name}"), layer)
    return state


def load(pipe, **states):
    "Load state dicts as PEFT adapters of these names, to compare with."
    for name, state in states.items(): pipe.load_lora_weights(dict(state), adapter_name=name)


def latents(pipe, n=1, seed=0):
    "Starting noise of a run."
    component, module = denoiser(pipe)
    draw = torch.Generator().manual_seed(seed)
    if component == "transformer": return torch.randn(n, 16, 16, generator=draw)
    return torch.randn(n, 4, 8, 8, generator=draw)


def run(pipe, prompt="a dog in ink", steps=4, seed=0, n=1, **kwargs):
    "Latents at the end of a run, float32."
    if "latents" not in kwargs and "image" not in kwargs: kwargs["latents"] = latents(pipe, n, seed).to(denoiser(pipe)[1].dtype)
    if "image" in kwargs: kwargs["generator"] = torch.Generator().manual_seed(seed)
    if "image" not in kwargs: kwargs |= dict(height=16, width=16)
    if denoiser(pipe)[0] == "transformer": kwargs.setdefault("max_sequence_length", 16)
    return pipe(prompt, num_inference_steps=steps, num_images_per_prompt=n, output_type="latent", **kwargs).images.float()


@pytest.fixture(autouse=True, scope="module")
def quiet():
    "One thread, and no advice from the libraries we compare with; acts in every test file that imports it."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("diffusers", "transformers", "peft"): logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
