"""Fetch the pinned emoji sets, draw them, and make augmented 64 × 64 pictures in any style."""
import functools
import json
import math
import shutil
import subprocess

import numpy as np
import torch
import torch.nn.functional as F

import world
from common import RUNS

SIZE, FINE = 64, 128   # pictures; drawings and styles are worked at twice the size and averaged down
GREY = torch.tensor([.299, .587, .114]).view(1, 3, 1, 1)


def fetch():
    """Install the pinned npm packages (checksums are verified by npm) and draw every emoji once."""
    home = RUNS / "npm"
    home.mkdir(parents=True, exist_ok=True)
    lock = json.loads((world.HERE / "pins.json").read_text())
    (home / "package.json").write_text(json.dumps(lock["packages"][""]))
    shutil.copy(world.HERE / "pins.json", home / "package-lock.json")
    if not (home / "node_modules").exists():
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=home, check=True)
    if not (RUNS / "drawings" / "names.json").exists():
        subprocess.run(["node", str(world.HERE / "render.mjs"), str(home), str(RUNS / "drawings")], check=True)


@functools.cache
def names():
    """Emoji names in the order of the drawings."""
    return json.loads((RUNS / "drawings" / "names.json").read_text())


@functools.cache
def drawings(vendor):
    """All drawings of one vendor style: [name, 128, 128, 4] uint8, read from disk as needed."""
    return np.memmap(RUNS / "drawings" / f"{vendor}.rgba", dtype=np.uint8, mode="r").reshape(-1, FINE, FINE, 4)


def rgba(vendor, name):
    """One drawing as premultiplied [4, 128, 128] floats in 0 … 1."""
    picture = torch.from_numpy(drawings(vendor)[names().index(name)].copy()).permute(2, 0, 1).float() / 255
    return torch.cat([picture[:3] * picture[3:], picture[3:]])


def place(pictures, generator=None, scale=(.74, .94), turn=7., shift=.07):
    """Move, size and turn drawings at random on the canvas; without a generator: centred, at .86."""
    count = len(pictures)
    def uniform(low, high): return torch.rand(count, generator=generator) * (high - low) + low
    if generator is None:
        size, angle, dx, dy = torch.full((count,), .86), *torch.zeros(3, count)
    else:
        size, angle = uniform(*scale), uniform(-turn, turn) * math.pi / 180
        dx, dy = uniform(-2 * shift, 2 * shift), uniform(-2 * shift, 2 * shift)
    cos, sin = angle.cos() / size, angle.sin() / size
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    grid = F.affine_grid(theta, (count, 4, FINE, FINE), align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def widen(mask, pixels):
    """Grow a mask by that many fine pixels, with round corners."""
    reach = torch.arange(-pixels, pixels + 1)
    disc = (reach[:, None] ** 2 + reach ** 2 <= pixels ** 2 + 1).float()[None, None]
    return (F.conv2d(mask, disc, padding=pixels)).clamp(0, 1)


def over(top, alpha, ground):
    """Lay `top` over `ground` where alpha says so."""
    return top * alpha + ground * (1 - alpha)


def coordinates():
    """Row and column of every fine pixel."""
    return torch.meshgrid(torch.arange(FINE).float(), torch.arange(FINE).float(), indexing="ij")


def colour(red, green, blue):
    return torch.tensor([red, green, blue]).view(1, 3, 1, 1)


def grey(canvas):
    return (canvas * GREY).sum(1, keepdim=True)


def duotone(canvas, alpha):
    """Brightness becomes dark violet, lilac, white."""
    light = grey(canvas)
    low = over(colour(.74, .52, .96), (light / .6).clamp(0, 1), colour(.22, .06, .42))
    return over(colour(1, 1, 1), ((light - .6) / .4).clamp(0, 1), low)


def turned(canvas, alpha):
    """Colours turned by 140 degrees around grey."""
    cos, sin = math.cos(math.radians(140)), math.sin(math.radians(140))
    eye, ones = torch.eye(3), torch.ones(3, 3) / 3
    cross = torch.tensor([[0., -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return torch.einsum("ij,bjhw->bihw", cos * eye + sin * cross + (1 - cos) * ones, canvas).clamp(0, 1)


def rainbow(canvas, alpha):
    """The subject filled with a diagonal rainbow, shaded by its own brightness."""
    rows, columns = coordinates()
    hue = (rows + columns) / (2 * FINE) * 6
    bright = torch.stack([(hue - 3).abs() - 1, 2 - (hue - 2).abs(), 2 - (hue - 4).abs()]).clamp(0, 1)
    return over(bright[None] * (.25 + .75 * grey(canvas)), alpha, canvas)


def night(canvas, alpha):
    """Light and dark exchanged, hues kept; the ground too."""
    return canvas + 1 - canvas.amax(1, keepdim=True) - canvas.amin(1, keepdim=True)


def hatch(canvas, alpha):
    """Diagonal blue hatching, denser where it is darker, in a thin outline."""
    rows, columns = coordinates()
    wave = ((rows + columns) % 14 - 7).abs() / 7
    ink = ((1.15 - grey(canvas)) * 1.1 - wave).mul(6).clamp(0, 1) * alpha
    edge = (widen(alpha, 2) - alpha).clamp(0, 1)
    return over(colour(.08, .18, .55), torch.maximum(ink, edge), over(colour(1, 1, 1), alpha, canvas))


def mosaic(canvas, alpha):
    """Blocks of 4 × 4 pixels, the ground too."""
    return F.interpolate(F.avg_pool2d(canvas, 8), scale_factor=8)


def sticker(canvas, alpha):
    """Two or three tones a colour and a thick black contour."""
    flat = (canvas * 2).round() / 2
    return over(over(flat, alpha, colour(0, 0, 0)), widen(alpha, 7), canvas)


def dark_parts(canvas, alpha):
    """Where the subject is darker than its own mean."""
    light = grey(canvas)
    mean = (light * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp(min=1)
    return ((mean - light) * 40 + .9).clamp(0, 1)


def stamp(canvas, alpha):
    """What is darker than the subject's mean becomes red ink, the rest paper; an outline in ink."""
    ink = torch.maximum(dark_parts(canvas, alpha) * alpha, (widen(alpha, 3) - alpha).clamp(0, 1))
    return over(colour(.82, .08, .12), ink, over(colour(1, 1, 1), alpha, canvas))


def shadow(canvas, alpha):
    """A long hard shadow to the lower right, on the ground."""
    cast = alpha
    for step in (1, 2, 4, 8, 9):
        cast = torch.maximum(cast, F.pad(cast, (step, -step, step, -step)))
    return over(over(canvas, alpha, colour(.42, .48, .74)), cast, canvas)


PROCEDURAL = {f.__name__: f for f in (duotone, turned, rainbow, night, hatch, mosaic, sticker, stamp, shadow)}


def vendor_of(style):
    """The emoji set whose drawing a style starts from."""
    return "flat" if style in PROCEDURAL else style


def paint(pictures, ground, style):
    """Placed premultiplied drawings on grounds [B, 3] → finished [B, 3, 64, 64] pictures in 0 … 1."""
    alpha = pictures[:, 3:].clamp(0, 1)
    canvas = (pictures[:, :3] + ground.view(-1, 3, 1, 1) * (1 - alpha)).clamp(0, 1)
    if style in PROCEDURAL:
        canvas = PROCEDURAL[style](canvas, alpha)
    return F.avg_pool2d(canvas, 2).clamp(0, 1)


def truth(name, style):
    """The true picture [3, 64, 64] of an emoji in a style, centred on white."""
    return paint(place(rgba(vendor_of(style), name)[None]), torch.ones(1, 3), style)[0]


def grounds(count, generator, white=.6, without=()):
    """Names and colours [count, 3] of random grounds, mostly white."""
    others = [name for name in world.GROUNDS if name != "white" and name not in without]
    pick = torch.randint(len(others), (count,), generator=generator)
    plain = torch.rand(count, generator=generator) < white
    chosen = ["white" if p else others[i] for p, i in zip(plain.tolist(), pick.tolist())]
    return chosen, torch.tensor([world.GROUNDS[name] for name in chosen]).float() / 255


if __name__ == "__main__":
    fetch()
