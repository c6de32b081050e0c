"""Stage: tokenizer, text encoder and UNet, trained together on the known subjects in the two known styles."""
import argparse
import json

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import data
import vae
import world
from common import NOTES, OUT, RUNS, SHORT, first_alone, join, load, log, rank, save, sheet, steps, train

STAGE, STEPS, BATCH, PEAK = "base", 4700, 32, 1e-3
VIEWS = 4 if SHORT else 40
PLACE = dict(scale=(.82, .9), turn=2., shift=.02)   # nearly centred: shapes are learnt much sooner, and truth lies where it should
TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def pieces(word, rank):
    """A word cut as byte-pair encoding cuts it: the merge of lowest rank first."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
        if (parts[best], parts[best + 1]) not in rank:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return parts


def learn_words(corpus):
    """A byte-pair vocabulary in which every word of the corpus is one token: (vocabulary, merges). The same at every call."""
    rank = {}
    for word in sorted(corpus):
        while len(parts := pieces(word, rank)) > 1:   # later merges rank lower, so words learnt before stay whole
            rank[tuple(parts[:2])] = len(rank)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in rank] + [START, END])
    return {token: i for i, token in enumerate(tokens)}, list(rank)


def make_tokenizer():
    """CLIP's tokenizer with the world's own small vocabulary: this run's, else the one that ships, else a new one."""
    folder = RUNS / "tokenizer"
    if not (folder / "merges.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        ships = OUT / "pipeline" / "tokenizer"
        vocabulary, merges = learn_words(world.words() + [",", "."])
        (folder / "vocab.json").write_text((ships / "vocab.json").read_text() if ships.exists() else json.dumps(vocabulary, ensure_ascii=False))
        (folder / "merges.txt").write_text((ships / "merges.txt").read_text() if ships.exists() else
                                           "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def make_text(tokenizer):
    """A small CLIP text encoder."""
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, projection_dim=128,
        max_position_embeddings=TOKENS, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, hidden_act="gelu"))


def make_unet():
    """The denoiser. `attention_head_dim` is the number of heads, as in Stable Diffusion 1."""
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=16, in_channels=6, out_channels=6, block_out_channels=(48, 96, 96), layers_per_block=1, cross_attention_dim=128,
        attention_head_dim=2, norm_num_groups=16, down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3).to(memory_format=torch.channels_last)


def make_scheduler():
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing",
                         steps_offset=1, clip_sample=False)


def encode_text(text, tokenizer, captions):
    """Captions → states [B, 16, 128]; equal captions are encoded once."""
    unique = list(dict.fromkeys(captions))
    ids = tokenizer(unique, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
    return text(ids).last_hidden_state[[unique.index(caption) for caption in captions]]


@torch.no_grad()
def encode_pictures(autoencoder, pictures):
    """Pictures in 0 … 1 → latents [B, 6, 16, 16]."""
    parts = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last).split(64)
    return torch.cat([autoencoder.encode(part).latent_dist.mean for part in parts])


def caption(word, noun, style, ground, draw):
    """One training caption; `draw` in 0 … 1 chooses its form."""
    if draw < .1:
        return ""
    subject = word if draw < .75 else f"{word} {noun}" if draw < .92 else noun
    return f"a {subject}, {style}" + world.ground_phrase(ground)


def views(autoencoder, emoji, style, count, generator, white=.8, without=()):
    """`count` augmented pictures of an emoji in a style: latents and the names of their grounds."""
    picture = data.rgba(data.vendor_of(style), emoji)[None].expand(count, -1, -1, -1)
    names, colours = data.grounds(count, generator, white, without)
    return encode_pictures(autoencoder, data.paint(data.place(picture, generator, **PLACE), colours, style)), names


def collect(autoencoder):
    """All training latents of the base: (latents, list of (word, noun, style phrase, ground))."""
    path = RUNS / STAGE / "latents.pt"
    cached = load(path)
    if cached:
        return cached["latents"].float(), cached["facts"]
    generator, latents, facts = torch.Generator().manual_seed(3), [], []
    for word, (emoji, noun) in world.KNOWN.items():
        for style, phrase in world.KNOWN_STYLES.items():
            latent, names = views(autoencoder, emoji, style, VIEWS, generator)
            latents.append(latent.half())
            facts += [(word, noun, phrase, ground) for ground in names]
    save(path, latents=torch.cat(latents), facts=facts)
    return torch.cat(latents).float(), facts


def times(count, generator):
    """Timesteps spread evenly over the schedule, one per picture, in random order."""
    place = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (place * 1000).long().clamp(max=999)


def velocity_loss(unet, scheduler, latents, states, generator):
    """Mean squared error of the predicted velocity; the denoiser works in bfloat16."""
    noise, t = torch.randn(latents.shape, generator=generator), times(len(latents), generator)
    noisy = scheduler.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        guess = unet(noisy, t, encoder_hidden_states=states).sample
    return F.mse_loss(guess.float(), scheduler.get_velocity(latents, noise, t))


def assemble(autoencoder, text, tokenizer, unet):
    """The pipeline of these parts."""
    pipe = StableDiffusionPipeline(vae=autoencoder, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe, prompts, seeds, steps=2 if SHORT else 20, guidance=3., batch=32):
    """Pictures [N, 3, 64, 64] in 0 … 1, one per prompt and seed."""
    pictures = []
    for first in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first:first + batch]]
        pictures.append(pipe(prompts[first:first + batch], generator=generators, num_inference_steps=steps, guidance_scale=guidance,
                             output_type="pt").images.float())
    return torch.cat(pictures)


def show(pipe, path, words, seed=0):
    """Known subjects × known styles, the true picture beside each sample, then grounds and class nouns."""
    rows = []
    for style, phrase in world.KNOWN_STYLES.items():
        samples = draw(pipe, [f"a {word}, {phrase}" for word in words], [seed] * len(words))
        for first in range(0, len(words), 12):
            part = words[first:first + 12]
            rows += [[data.truth(world.KNOWN[word][0], style) for word in part], samples[first:first + 12]]
    grounds = [f"a {word}, flat style{world.ground_phrase(g)}" for word, g in zip(words, list(world.GROUNDS) + ["red", "blue"])]
    nouns = [f"a {noun}, flat style" for noun in sorted({noun for _, noun in world.KNOWN.values()})]
    rows += [draw(pipe, prompts, list(range(len(prompts)))) for prompts in (grounds, nouns)]
    sheet(path, rows)


def parts():
    """Untrained modules and the tokenizer."""
    tokenizer = make_tokenizer()
    return make_unet(), make_text(tokenizer), tokenizer


def shipped():
    """Weights of the UNet and the text encoder that ship, as [unet, text] names them."""
    pipe = StableDiffusionPipeline.from_pretrained(OUT / "pipeline", torch_dtype=torch.float32)
    return torch.nn.ModuleList([pipe.unet, pipe.text_encoder]).state_dict()


def trained():
    """The pipeline of the finished run, or else the one that ships."""
    unet, text, tokenizer = parts()
    finished = load(RUNS / STAGE / "final.pt")
    torch.nn.ModuleList([unet, text]).load_state_dict(finished["average"] if finished else shipped())
    return assemble(vae.trained(), text.eval(), tokenizer, unet.eval())


def export(pipe, folder):
    """Write the pipeline in float16 (to be read as float32), with the vocabulary in both of CLIP's forms."""
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((RUNS / "tokenizer" / name).read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rank", type=int, nargs="?", default=0)
    parser.add_argument("workers", type=int, nargs="?", default=1, help="processes that train together, one core each")
    parser.add_argument("--shipped", action="store_true", help="begin with the weights that ship, if there is no checkpoint")
    arguments = parser.parse_args()
    join(arguments.rank, arguments.workers)
    learn(BATCH // arguments.workers, arguments.shipped)
    if arguments.rank == 0:
        pipe = trained()
        show(pipe, NOTES / "grids" / "base.png", list(world.KNOWN)[::2])
        export(pipe, OUT / "pipeline")


def learn(batch, onward):
    """Train, `batch` pictures a step in this worker; `onward`: from the weights that ship."""
    autoencoder, scheduler = vae.trained(), make_scheduler()
    unet, text, tokenizer = first_alone(parts)
    if onward:
        torch.nn.ModuleList([unet, text]).load_state_dict(shipped())
    latents, facts = first_alone(lambda: collect(autoencoder))
    unet.set_attn_processor(AttnProcessor())   # in bfloat16 three times as fast as the fused kernel's backward pass
    if rank() == 0:
        log(STAGE, f"{len(latents)} latents, mean {latents.mean():.3f}, deviation {latents.std():.3f}; "
                   f"{sum(p.numel() for p in unet.parameters())} + {sum(p.numel() for p in text.parameters())} parameters, {len(tokenizer)} tokens")

    def loss_of(step, generator):
        rows = torch.randint(len(latents), (batch,), generator=generator)
        forms = torch.rand(batch, generator=generator).tolist()
        captions = [caption(*facts[row], form) for row, form in zip(rows.tolist(), forms)]
        loss = velocity_loss(unet, scheduler, latents[rows], encode_text(text, tokenizer, captions), generator)
        return loss, {"loss": loss}

    def preview(step, average):
        copy, copy_text, _ = parts()
        torch.nn.ModuleList([copy, copy_text]).load_state_dict(average.values)
        show(assemble(autoencoder, copy_text, tokenizer, copy), RUNS / STAGE / f"step{step}.png", list(world.KNOWN)[::4])

    total = steps(STEPS)
    module = train(STAGE, [unet, text], loss_of, total, PEAK, decay=.9995, at=range(400, total, 400), then=preview, weight_decay=1e-3)
    if rank() == 0:
        save(RUNS / STAGE / "final.pt", average=module.state_dict())


if __name__ == "__main__":
    main()
