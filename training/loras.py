"""Stage: subject LoRAs and style LoRAs on the attention projections of the UNet."""
import argparse

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import base
import data
import world
from common import NOTES, OUT, RUNS, SHORT, log, sheet, steps, train

STAGE, BATCH, PEAK = "loras", 8, 2e-3
SUBJECT_STEPS, STYLE_STEPS = 320, 460
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SUBJECT_VIEWS, STYLE_VIEWS, STYLE_SUBJECTS = 96, 8, 60
HARD_GROUNDS = {"line": ("black",)}   # black ink cannot be seen there


def style_words():
    """The known subjects that style LoRAs learn from; the other known ones stay for the floors."""
    return [word for i, word in enumerate(world.KNOWN) if i % 4 != 3]


def subject_set(name, autoencoder, generator):
    """Latents of one subject in flat, and for each the forms of its caption."""
    latents, grounds = base.views(autoencoder, world.EMOJI.get(name, name), "flat", 8 if SHORT else SUBJECT_VIEWS, generator)
    captions = [[f"a {world.phrase(name)}{style}{world.ground_phrase(ground)}" for style in ("", ", flat style")] for ground in grounds]
    return latents, captions


def style_set(name, autoencoder, generator):
    """Latents of known subjects in one style, and for each the forms of its caption."""
    latents, captions = [], []
    for word in style_words()[:4] if SHORT else style_words():
        emoji, noun = world.KNOWN[word]
        latent, grounds = base.views(autoencoder, emoji, name, 2 if SHORT else STYLE_VIEWS, generator, white=.7, without=HARD_GROUNDS.get(name, ()))
        latents.append(latent)
        captions += [[f"a {subject}, {world.STYLE_PHRASE}{world.ground_phrase(ground)}" for subject in (word, word, f"{word} {noun}", noun)]
                     for ground in grounds]
    return torch.cat(latents), captions


def write(unet, config, kind, name):
    """What diffusers itself writes: `unet.….lora_A.weight`, float16, alpha in the metadata."""
    layers = {key: value.half().contiguous() for key, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(OUT / "loras" / kind, unet_lora_layers=layers, weight_name=f"{name}.safetensors",
                                              unet_lora_adapter_metadata=config.to_dict())


def learn(kind, name, peak):
    """Train one LoRA and write it."""
    pipe, scheduler = base.trained(), base.make_scheduler()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    setting = world.settings(name, SUBJECT_STEPS if kind == "subjects" else STYLE_STEPS)
    latents, captions = (subject_set if kind == "subjects" else style_set)(name, pipe.vae, generator)
    torch.manual_seed(sum(map(ord, name)))
    config = LoraConfig(r=setting["rank"], lora_alpha=setting["alpha"], target_modules=TARGETS, init_lora_weights="gaussian")
    pipe.unet.requires_grad_(False)
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.unet.to(torch.bfloat16).add_adapter(config)
    for parameter in pipe.unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layers = torch.nn.ParameterDict({key.replace(".", "/"): p for key, p in pipe.unet.named_parameters() if p.requires_grad})
    with torch.no_grad():
        unique = sorted({form for forms in captions for form in forms} | {""})
        states = dict(zip(unique, base.encode_text(pipe.text_encoder, pipe.tokenizer, unique)))

    def loss_of(step, generator):
        rows = torch.randint(len(latents), (BATCH,), generator=generator).tolist()
        forms = torch.rand(BATCH, generator=generator).tolist()
        chosen = ["" if u < .1 else captions[row][int((u - .1) / .9 * len(captions[row]))] for row, u in zip(rows, forms)]
        loss = base.velocity_loss(pipe.unet, scheduler, latents[rows], torch.stack([states[c] for c in chosen]), generator)
        return loss, {"loss": loss}

    stage = f"{STAGE}/{kind}/{name}"
    train(stage, [layers], loss_of, steps(setting["steps"]), peak, decay=.99, weight_decay=0., every=250)
    write(pipe.unet, config, kind, name)


def shown(kind, name, pipe):
    """Samples of one LoRA: a row for the contact sheet, led by what it should look like."""
    pipe.load_lora_weights(OUT / "loras" / kind / f"{name}.safetensors", adapter_name="shown")
    if kind == "subjects":
        prompts = [f"a {world.phrase(name)}"] * 4 + [f"a {world.phrase(name)}, flat style, on {ground}" for ground in ("blue", "yellow", "black")]
        truth = [data.truth(name, "flat")]
    else:
        words = ["pig", "owl", "lemon", "pizza", "umbrella", "car", "skull"]
        prompts = [f"a {word}, {world.STYLE_PHRASE}" for word in words]
        truth = [data.truth(world.KNOWN[word][0], name) for word in words]
    samples = base.draw(pipe, prompts, list(range(len(prompts))))
    pipe.unload_lora_weights()
    return [*truth, *samples]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["subjects", "styles"])
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    parser.add_argument("--peak", type=float, default=PEAK, help="learning rate")
    arguments = parser.parse_args()
    every = world.SUBJECTS if arguments.kind == "subjects" else world.STYLES
    for name in arguments.names or every:
        if not (OUT / "loras" / arguments.kind / f"{name}.safetensors").exists() or arguments.names:
            learn(arguments.kind, name, arguments.peak)
    pipe = base.trained()
    sheet(NOTES / "grids" / f"{arguments.kind}.png", [shown(arguments.kind, name, pipe) for name in every
                                                     if (OUT / "loras" / arguments.kind / f"{name}.safetensors").exists()])


if __name__ == "__main__":
    main()
