"""More subjects and styles than ship: 24 subjects × 12 styles, and a larger world of them to judge rules by. About an hour of one core, resumable.

    python training/data.py                            # the drawings, once
    python training/shelf.py subjects & python training/shelf.py styles
    python training/shelf.py sheet                     # what the styles should look like: training/runs/shelf/true.png
    python training/shelf.py judge                     # a judge that knows the shelf's subjects and styles besides those that ship, ten minutes
    python training/shelf.py world                     # the index of the larger world, read by benchmarks/leaderboard.py --larger

LoRAs go to training/runs/shelf/loras, made as those that ship (loras.py). None of the names is known to the base, the shipped judge or the probe encoder."""
import argparse
import math

import torch

import common
import data
import loras
import world
from common import OUT, RUNS, sheet, to_picture, write_json
from data import FINE, colour, coordinates, dark_parts, grey, over, widen

SHELF = RUNS / "shelf"
NEW = {  # subject: (emoji name, class noun)
    "backpack": ("backpack", "garment"), "bat": ("bat", "animal"), "bear": ("bear", "animal"), "broccoli": ("broccoli", "plant"),
    "candle": ("candle", "tool"), "carrot": ("carrot", "plant"), "croissant": ("croissant", "food"), "drum": ("drum", "toy"),
    "eggplant": ("eggplant", "fruit"), "gem": ("gem-stone", "tool"), "house": ("house", "furniture"), "jellyfish": ("jellyfish", "animal"),
    "kite": ("kite", "toy"), "lipstick": ("lipstick", "tool"), "meat": ("meat-on-bone", "food"), "rabbit": ("rabbit-face", "animal"),
    "socks": ("socks", "garment"), "sushi": ("sushi", "food"), "telephone": ("telephone", "tool"), "tomato": ("tomato", "fruit"),
    "unicorn": ("unicorn", "animal"), "popcorn": ("popcorn", "food"), "pencil": ("pencil", "tool"), "cup": ("hot-beverage", "food"),
}


def ramp(light, *stops):
    """Brightness 0 … 1 becomes these colours, evenly spaced."""
    out = colour(*stops[0]).expand(len(light), 3, *light.shape[2:])
    for i, stop in enumerate(stops[1:]):
        out = over(colour(*stop), (light * (len(stops) - 1) - i).clamp(0, 1), out)
    return out


def fire(canvas, alpha):
    """Brightness becomes black, red, yellow, cream."""
    return ramp(grey(canvas), (.1, 0, .02), (.85, .12, .05), (1, .75, .1), (1, 1, .85))


def ice(canvas, alpha):
    """Brightness becomes navy, cyan, white."""
    return ramp(grey(canvas), (.02, .1, .3), (.1, .6, .8), (.92, 1, 1))


def sepia(canvas, alpha):
    """Brightness becomes brown on cream."""
    return ramp(grey(canvas), (.2, .1, .02), (.6, .42, .22), (.96, .9, .75))


def tinted(canvas, alpha):
    """Red, green and blue change places."""
    return canvas[:, [2, 0, 1]]


def dots(canvas, alpha):
    """Green halftone dots in a thin outline."""
    rows, columns = coordinates()
    wave = (torch.cos(rows / 4 * math.pi) * torch.cos(columns / 4 * math.pi) + 1) / 2
    ink = ((1.1 - grey(canvas)) * 1.1 - wave).mul(6).clamp(0, 1) * alpha
    edge = (widen(alpha, 2) - alpha).clamp(0, 1)
    return over(colour(.02, .35, .15), torch.maximum(ink, edge), over(colour(1, 1, 1), alpha, canvas))


def stripes(canvas, alpha):
    """White bands across the subject."""
    rows, _ = coordinates()
    return over(colour(.97, .97, .97), ((rows % 16) < 6).float()[None, None] * alpha, canvas)


def glow(canvas, alpha):
    """A wide orange rim."""
    return over(canvas, alpha, over(colour(1, .55, .05), widen(alpha, 10), canvas))


def poster(canvas, alpha):
    """Navy and cream on an orange ground."""
    ink = over(colour(.08, .12, .35), dark_parts(canvas, alpha), colour(1, .95, .85))
    return over(ink, alpha, colour(.95, .5, .2).expand_as(canvas))


def pastel(canvas, alpha):
    """Half as strong, in a violet contour."""
    pale = canvas * .5 + .5
    return over(over(pale, alpha, colour(.5, .3, .7)), widen(alpha, 5), pale)


def greyred(canvas, alpha):
    """Grey, in a red contour."""
    plain = grey(canvas).expand_as(canvas)
    return over(over(plain, alpha, colour(.9, .1, .1)), widen(alpha, 5), plain)


def sunset(canvas, alpha):
    """The ground from violet to orange."""
    rows, _ = coordinates()
    sky = over(colour(1, .65, .3), (rows / FINE)[None, None], colour(.35, .2, .55))
    return over(canvas, alpha, sky.expand_as(canvas))


def anaglyph(canvas, alpha):
    """Red to the left, green and blue to the right."""
    return torch.cat([torch.roll(canvas[:, :1], -6, 3), torch.roll(canvas[:, 1:], 6, 3)], 1)


STYLES = {f.__name__: f for f in (fire, ice, sepia, tinted, dots, stripes, glow, poster, pastel, greyred, sunset, anaglyph)}


def furnish():
    """Let world, data and loras know the new names."""
    data.PROCEDURAL.update(STYLES)
    loras.OUT = common.NOTES = SHELF   # logs lie beside them, not among those of the shipped weights
    every = {1: dict(rank=16, alpha=16), 2: dict(rank=4, alpha=4), 5: dict(rank=16, alpha=16), 6: dict(rank=4, alpha=4), 3: dict(alpha=16), 7: dict(longer=2)}
    for i, (name, (emoji, noun)) in enumerate(NEW.items()):
        world.SUBJECT_NOUN[name], world.EMOJI[name] = noun, emoji
        world.UNEVEN[name] = every.get(i % 8, {})   # real shelves are uneven
    world.UNEVEN.update(dict.fromkeys(("dots", "tinted", "stripes", "anaglyph"), dict(rank=16, alpha=16, longer=2)), fire=dict(rank=4, alpha=4))


def judge():
    """A judge trained as the shipped one, on the subjects and styles of shelf and package together."""
    import encoders
    encoders.EMOJI.update({name: world.EMOJI[name] for name in NEW})
    encoders.SUBJECT_WORDS[:], encoders.STYLE_WORDS[:] = sorted(encoders.EMOJI), sorted([*encoders.STYLE_WORDS, *STYLES])
    encoders.KINDS["judge"].update(seed=29)
    encoders.VIEWS, encoders.STEPS = 6, 2600   # twice as many classes of subject × style
    common.RUNS = encoders.RUNS = encoders.OUT = SHELF
    (SHELF / "judge").mkdir(parents=True, exist_ok=True)
    encoders.learn("judge")


def larger_world():
    """world.json of shelf and package, and the shelf's true pictures: every pair of a shelf subject with a shelf style is one of the split `shelf`."""
    import export
    index, sides = export.index(), {}
    for kind, names, steps in (("subjects", NEW, loras.SUBJECT_STEPS), ("styles", STYLES, loras.STYLE_STEPS)):
        facts = {name: dict(file=str(SHELF / f"loras/{kind}/{name}.safetensors"), word=name, phrase=world.phrase(name) if kind == "subjects" else world.STYLE_PHRASE,
                            half="shelf", **world.settings(name, steps)) for name in names}
        sides[kind] = {name: known | dict(file=str(OUT / known["file"])) for name, known in index[kind].items()} | facts
    for kind, names in (("subject", NEW), ("style", STYLES)):
        prompts = index["judge_prompts"][kind]
        prompts["words"] = sorted([*prompts["words"], *names])
    pairs = [dict(subject=subject, style=style, split="shelf", aligned=True) for subject in NEW for style in STYLES]
    (SHELF / "truth").mkdir(exist_ok=True)
    for pair in pairs:
        to_picture(data.truth(world.EMOJI[pair["subject"]], pair["style"])).save(SHELF / f"truth/{pair['subject']}__{pair['style']}.png")
    write_json(SHELF / "world.json", index | sides | dict(pairs=index["pairs"] + pairs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["subjects", "styles", "sheet", "judge", "world"])
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    arguments = parser.parse_args()
    furnish()
    if arguments.kind == "sheet":
        return sheet(SHELF / "true.png", [[data.truth(world.EMOJI[name], style) for name in NEW] for style in STYLES])
    if arguments.kind in ("judge", "world"):
        return judge() if arguments.kind == "judge" else larger_world()
    for name in arguments.names or (NEW if arguments.kind == "subjects" else STYLES):
        if not (SHELF / "loras" / arguments.kind / f"{name}.safetensors").exists():
            loras.learn(arguments.kind, name, loras.PEAK)


if __name__ == "__main__":
    main()
