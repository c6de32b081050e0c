"""Stage: the probe encoder and the judge, two small open_clip models trained apart on all subjects in all styles."""
import argparse
import json
import os

import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import open_clip
from safetensors.torch import save_file

import base
import data
import world
from common import OUT, RUNS, SHORT, load, log, save, steps, train
from loramix.evaluate import class_probabilities

SUBJECT_TEMPLATE, STYLE_TEMPLATE, BOTH_TEMPLATE = "a {}", "a picture, {} style", "a {}, {} style"
VIEWS, BATCH, STEPS = 2 if SHORT else 10, 64, 2000
TEXT = dict(context_length=base.TOKENS, width=64, heads=2, layers=1, hf_tokenizer_name="clip", pool_type="argmax")
KINDS = {   # two architectures, two seeds, two ways of augmenting
    "probe": dict(folder="pipeline/probe_encoder", seed=11, peak=1e-3,
                  vision=dict(image_size=64, patch_size=8, width=96, layers=3, head_width=32),
                  # trained by its class token, read by the mean of its patches, whose distances spread over 0 … 0.8 as a discrepancy's
                  # should; the contrastive token itself puts any two different pictures at about 1
                  read=dict(pool_type="avg")),
    "judge": dict(folder="judge", seed=23, peak=2e-3,
                  vision=dict(image_size=64, layers=[1, 1, 1, 1], width=12, head_width=64)),
}
EMOJI = {word: emoji for word, (emoji, _) in world.KNOWN.items()} | {name: name for name in world.SUBJECTS}
SUBJECT_WORDS, STYLE_WORDS = sorted(EMOJI), sorted([*world.STYLES, *world.LEFT_OUT, *world.KNOWN_STYLES])


def write_tokenizer(folder):
    """The world's vocabulary, padded with a token other than the end token."""
    tokenizer = base.make_tokenizer()
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(folder)
    return tokenizer


def config(kind, tokens):
    """What open_clip_config.json holds."""
    text = TEXT | dict(vocab_size=tokens)
    return dict(model_cfg=dict(embed_dim=64, vision_cfg=KINDS[kind]["vision"], text_cfg=text),
                preprocess_cfg=dict(mean=[.5, .5, .5], std=[.5, .5, .5], interpolation="bicubic", resize_mode="squash"))


def make(kind, tokens):
    """The untrained model."""
    torch.manual_seed(KINDS[kind]["seed"])
    name = f"loramix-{kind}"
    path = RUNS / kind / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config(kind, tokens)["model_cfg"]))
    open_clip.add_model_config(path)
    return open_clip.create_model(name)


def pictures(seed, views):
    """Every subject in every style: uint8 [N, 3, 64, 64], subject numbers, style numbers."""
    generator, parts, whats, hows = torch.Generator().manual_seed(seed), [], [], []
    for what, word in enumerate(SUBJECT_WORDS):
        for how, style in enumerate(STYLE_WORDS):
            drawing = data.rgba(data.vendor_of(style), EMOJI[word])[None].expand(views, -1, -1, -1)
            _, ground = data.grounds(views, generator, white=.75, without=("black",))
            parts.append((data.paint(data.place(drawing, generator), ground, style) * 255).byte())
            whats += [what] * views
            hows += [how] * views
    return torch.cat(parts), torch.tensor(whats), torch.tensor(hows)


def blur(batch, amount):
    """Mix with a 3 × 3 mean, once or twice."""
    for _ in range(2):
        batch = torch.lerp(batch, F.avg_pool2d(F.pad(batch, (1, 1, 1, 1), mode="replicate"), 3, 1), amount)
    return batch


def move(batch, generator, reach):
    """Shift and size pictures a little; what comes in continues the border."""
    count = len(batch)
    size = 1 + (torch.rand(count, generator=generator) - .5) * 2 * reach
    shift = (torch.rand(count, 2, generator=generator) - .5) * 2 * reach
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = size
    theta[:, :, 2] = shift
    return F.grid_sample(batch, F.affine_grid(theta, list(batch.shape), align_corners=False), padding_mode="border", align_corners=False)


def disturb(batch, kind, generator):
    """Each encoder's own way to spoil pictures in 0 … 1."""
    def per_picture(low, high): return torch.rand(len(batch), 1, 1, 1, generator=generator) * (high - low) + low
    batch = move(batch, generator, .08 if kind == "judge" else .14)
    if kind == "judge":   # soft and noisy, as a denoiser's pictures are
        batch = blur(batch, per_picture(-.2, .9).clamp(min=0))
        batch = batch + torch.randn(batch.shape, generator=generator) * per_picture(0, .08)
        coarse = F.interpolate(torch.randn(len(batch), 3, 8, 8, generator=generator), size=64, mode="bilinear") * per_picture(0, .06)
        return ((batch + coarse) * per_picture(.9, 1.08)).clamp(0, 1)
    batch = (batch - .5) * per_picture(.8, 1.15) + .5 + per_picture(-.06, .06)
    hole = torch.rand(len(batch), 1, 8, 8, generator=generator) < .06   # missing patches
    batch = torch.where(F.interpolate(hole.float(), size=64) > 0, torch.ones(()), batch)
    return (batch + torch.randn(batch.shape, generator=generator) * per_picture(0, .05)).clamp(0, 1)


def ids(tokenizer, captions):
    return tokenizer(captions, padding="max_length", truncation=True, max_length=base.TOKENS, return_tensors="pt").input_ids


def class_texts(tokenizer):
    """Token numbers of the zero-shot prompts of all subjects and of all styles."""
    return (ids(tokenizer, [SUBJECT_TEMPLATE.format(word) for word in SUBJECT_WORDS]),
            ids(tokenizer, [STYLE_TEMPLATE.format(word) for word in STYLE_WORDS]))


def read(kind):
    """A finished encoder, read as anyone would read it: (model, subject texts, style texts), texts as unit vectors."""
    source = f"local-dir:{OUT / KINDS[kind]['folder']}"
    model, _ = open_clip.create_model_from_pretrained(source)
    if kind == "probe":   # words are compared with the class token, whatever it is read by otherwise
        model.visual.pool_type = "tok"
    tokenizer = open_clip.get_tokenizer(source)
    with torch.no_grad():
        texts = [model.encode_text(tokenizer([template.format(word) for word in words]), normalize=True)
                 for template, words in ((SUBJECT_TEMPLATE, SUBJECT_WORDS), (STYLE_TEMPLATE, STYLE_WORDS))]
    return model.eval(), *texts


@torch.no_grad()
def classify(encoder, batch):
    """Probabilities of subjects and of styles of pictures in 0 … 1."""
    model, subjects, styles = encoder
    features = torch.cat([model.encode_image(part * 2 - 1, normalize=True) for part in batch.split(256)])
    scale = model.logit_scale.exp()
    return class_probabilities(features, subjects, scale), class_probabilities(features, styles, scale)


def learn(kind):
    """Train one encoder and write it."""
    folder, seed = OUT / KINDS[kind]["folder"], KINDS[kind]["seed"]
    tokenizer = write_tokenizer(folder)
    model = make(kind, len(tokenizer)).train()
    cache = RUNS / kind / "pictures.pt"
    seen = load(cache)
    if not seen:
        drawn, whats, hows = pictures(seed, VIEWS)
        save(cache, drawn=drawn, whats=whats, hows=hows)
        seen = load(cache)
    drawn, whats, hows = seen["drawn"], seen["whats"], seen["hows"]
    subject_ids, style_ids = class_texts(tokenizer)
    both_ids = ids(tokenizer, [BOTH_TEMPLATE.format(a, b) for a in SUBJECT_WORDS for b in STYLE_WORDS])

    def loss_of(step, generator):
        rows = torch.randint(len(drawn), (BATCH,), generator=generator)
        batch = disturb(drawn[rows].float() / 255, kind, generator)
        features = model.encode_image(batch * 2 - 1, normalize=True)
        what, how = whats[rows], hows[rows]
        pair = what * len(STYLE_WORDS) + how
        texts = model.encode_text(torch.cat([subject_ids, style_ids, both_ids[pair]]), normalize=True)
        subjects, styles, both = texts.split([len(SUBJECT_WORDS), len(STYLE_WORDS), BATCH])
        scale = model.logit_scale.exp().clamp(max=60)
        twins = (pair[:, None] == pair) & ~torch.eye(BATCH, dtype=torch.bool)
        alike = (scale * features @ both.T).masked_fill(twins, -1e4)
        by_subject, by_style = scale * features @ subjects.T, scale * features @ styles.T
        loss = (F.cross_entropy(by_subject, what, label_smoothing=.05) + F.cross_entropy(by_style, how, label_smoothing=.05)
                + .3 * F.cross_entropy(alike, torch.arange(BATCH)))
        right = [(guess.argmax(1) == true).float().mean() for guess, true in ((by_subject, what), (by_style, how))]
        return loss, {"loss": loss, "subject": right[0], "style": right[1]}

    train(kind, [model], loss_of, steps(STEPS), KINDS[kind]["peak"], decay=.99, weight_decay=.02, every=200)
    with torch.no_grad():
        model.logit_scale.clamp_(max=torch.tensor(60.).log())
    weights = {key: value.half().contiguous() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").chmod(0o644)
    shipped = config(kind, len(tokenizer))
    shipped["model_cfg"]["vision_cfg"] |= KINDS[kind].get("read", {})
    (folder / "open_clip_config.json").write_text(json.dumps(shipped, indent=1) + "\n")
    log(kind, f"{sum(p.numel() for p in model.parameters())} parameters; held-out drawings: "
              + " ".join(f"{k} {v:.3f}" for k, v in accuracy(kind).items()))


def accuracy(kind, views=2, seed=99):
    """Zero-shot accuracy on drawings in places and grounds never trained on, spoilt as in training."""
    drawn, whats, hows = pictures(seed, 1 if SHORT else views)
    generator = torch.Generator().manual_seed(seed)
    batch = disturb(drawn.float() / 255, kind, generator)
    subjects, styles = classify(read(kind), batch)
    right = [(guess.argmax(1) == true).float() for guess, true in ((subjects, whats), (styles, hows))]
    ours = torch.tensor([SUBJECT_WORDS[i] in world.SUBJECTS for i in whats.tolist()])
    return {"subject": right[0].mean().item(), "style": right[1].mean().item(), "both": (right[0] * right[1]).mean().item(),
            "held_out_subjects": right[0][ours].mean().item(), "n": len(drawn)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    learn(parser.parse_args().kind)


if __name__ == "__main__":
    main()
