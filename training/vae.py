"""Stage: the autoencoder. 64 × 64 pictures ↔ 6 × 16 × 16 latents, whitened."""
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import data
import world
from common import NOTES, OUT, RUNS, load, log, save, sheet, steps, train

STAGE, STEPS, BATCH = "vae", 3700, 16
WEAK = .3   # variance, before whitening, below which a latent direction stays small
STYLES = ["flat", "noto", "flat", "noto", "line", "gradient", "twemoji", *data.PROCEDURAL]


def make():
    """The untrained autoencoder."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=6, sample_size=data.SIZE, block_out_channels=(16, 32, 64), norm_num_groups=8,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=1., mid_block_add_attention=False).to(memory_format=torch.channels_last)


def pool():
    """Emoji that the autoencoder may see: all but the held-out subjects and their twins; those the world uses come thrice."""
    known = [emoji for emoji, _ in world.POOL.values()]
    return [name for name in data.names() if name not in world.TWINS and name not in world.SUBJECTS] + known * 2


def batch(names, count, generator):
    """Pictures [count, 3, 64, 64] in −1 … 1: four styles, random places and grounds, colour channels in random order."""
    chosen = [STYLES[int(torch.randint(len(STYLES), (1,), generator=generator))] for _ in range(4)]
    parts = []
    for style in chosen:
        picks = torch.randint(len(names), (count // 4,), generator=generator).tolist()
        pictures = torch.stack([data.rgba(data.vendor_of(style), names[i]) for i in picks])
        _, ground = data.grounds(count // 4, generator, white=.5)
        parts.append(data.paint(data.place(pictures, generator, scale=(.6, 1.1)), ground, style))
    pictures = torch.cat(parts)
    for row in torch.nonzero(torch.rand(len(pictures), generator=generator) < .6).flatten().tolist():
        pictures[row] = pictures[row, torch.randperm(3, generator=generator)]
    return (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)


def losses(model, pictures):
    """Absolute and squared error, the squared error of 4 × 4 means (colour), and a small pull of latents to the unit ball."""
    latent = model.encode(pictures).latent_dist.mean
    drawn = model.decode(latent + .03 * torch.randn_like(latent)).sample
    square = F.mse_loss(drawn, pictures)
    loss = F.l1_loss(drawn, pictures) + 2 * square + 20 * F.mse_loss(F.avg_pool2d(drawn, 4), F.avg_pool2d(pictures, 4))
    return loss + 1e-4 * latent.square().mean(), square


def psnr(square):
    """Decibels of a squared error of pictures in −1 … 1."""
    return 10 * torch.log10(4 / square)


@torch.no_grad()
def show(model, path):
    """Pictures above their reconstructions."""
    rows = []
    styles = ["flat", "noto", "line", *data.PROCEDURAL]
    for names in (["frog", "owl", "pizza", "camera"], ["robot", "peach", "snowman", "crab"]):
        for style in styles:
            pictures = torch.stack([data.truth(name, style) for name in names]) * 2 - 1
            drawn = model.decode(model.encode(pictures).latent_dist.mean).sample
            rows.append([p for pair in zip(pictures / 2 + .5, drawn / 2 + .5) for p in pair])
    half = len(styles)
    sheet(path, [a + b for a, b in zip(rows[:half], rows[half:])])


@torch.no_grad()
def whiten(model, names):
    """Fold into the quant convolutions the rotation and scale that give latents mean 0, no correlation and unit variance.

    Directions that hardly vary are not blown up to 1: the denoiser would spend itself on their noise.
    """
    generator = torch.Generator().manual_seed(7)
    latents = torch.cat([model.encode(batch(names, 32, generator)).latent_dist.mean for _ in range(steps(40))])
    flat = latents.permute(1, 0, 2, 3).flatten(1).double()
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh((flat - mean[:, None]) @ (flat - mean[:, None]).T / flat.shape[1])
    scale = values.clamp(min=WEAK).sqrt()
    there, back = (vectors / scale).T, vectors * scale
    quant, post = model.quant_conv, model.post_quant_conv
    weight, bias = quant.weight[:6, :, 0, 0].double(), quant.bias[:6].double()
    quant.weight[:6, :, 0, 0], quant.bias[:6] = (there @ weight).float(), (there @ (bias - mean)).float()
    quant.weight[6:], quant.bias[6:] = 0., -9.   # the sample is the mean, but for a hair
    weight = post.weight[:, :, 0, 0].double()
    post.bias.copy_((post.bias.double() + weight @ mean).float())
    post.weight[:, :, 0, 0] = (weight @ back).float()
    return values


def trained():
    """The finished autoencoder of this run, or else the one that ships."""
    finished, model = load(RUNS / STAGE / "final.pt"), make()
    model.load_state_dict(finished["model"] if finished else AutoencoderKL.from_pretrained(OUT / "pipeline" / "vae").float().state_dict())
    return model.eval().requires_grad_(False)


@torch.no_grad()
def quality(model):
    """Mean PSNR by style on the centred drawings of the held-out subjects."""
    result = {}
    for style in ["flat", "noto", "line", *data.PROCEDURAL]:
        pictures = torch.stack([data.truth(name, style) for name in world.SUBJECTS]) * 2 - 1
        result[style] = float(psnr(F.mse_loss(model.decode(model.encode(pictures).latent_dist.mean).sample, pictures)))
    return result


def main():
    model, names = make(), pool()
    def loss_of(step, generator):
        loss, square = losses(model, batch(names, BATCH, generator))
        return loss, {"loss": loss, "psnr": psnr(square)}
    total = steps(STEPS)
    def preview(step, average):
        copy = make()
        copy.load_state_dict({key[2:]: value for key, value in average.values.items()})
        show(copy, RUNS / STAGE / f"step{step}.png")
    train(STAGE, [model], loss_of, total, peak=2e-3, decay=.998, at=range(300, total, 300), then=preview, weight_decay=0., every=100)
    log(STAGE, "latent variances before whitening: " + " ".join(f"{v:.3f}" for v in whiten(model, names)))
    log(STAGE, "PSNR on held-out subjects: " + " ".join(f"{k} {v:.1f}" for k, v in quality(model).items()))
    save(RUNS / STAGE / "final.pt", model=model.state_dict())
    show(model, NOTES / "grids" / "vae.png")


if __name__ == "__main__":
    main()
