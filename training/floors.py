"""Stage: what the world is worth by the judge, beside the floors it must reach."""
import argparse
import json

import torch

import base
import encoders
import world
from common import NOTES, OUT, SHORT, write_json

BASE_FLOOR, SUBJECT_FLOOR, STYLE_FLOOR = .95, .90, .85
SUBJECT_SEEDS = 1 if SHORT else 12


def shares(encoder, pictures, words, styles=None):
    """Share of pictures whose most likely subject is the right word, and whose most likely style is."""
    subjects, hows = encoders.classify(encoder, pictures)
    what = torch.tensor([encoders.SUBJECT_WORDS.index(word) for word in words])
    result = {"right_subject": (subjects.argmax(1) == what).float().mean().item(), "n": len(words)}
    if styles:
        how = torch.tensor([encoders.STYLE_WORDS.index(style) for style in styles])
        result["right_style"] = (hows.argmax(1) == how).float().mean().item()
    return result


def of_base(pipe, encoder):
    """Known subjects in known styles, two seeds each."""
    wanted = [(word, style) for word in world.KNOWN for style in world.KNOWN_STYLES][::40 if SHORT else 1] * 2
    pictures = base.draw(pipe, [f"a {word}, {world.KNOWN_STYLES[style]}" for word, style in wanted], list(range(len(wanted))))
    return shares(encoder, pictures, *map(list, zip(*wanted)))


def of_subject(pipe, encoder, name):
    """One subject LoRA, plain and with the flat style named."""
    pipe.load_lora_weights(OUT / "loras" / "subjects" / f"{name}.safetensors", adapter_name="judged")
    prompts = [f"a {world.phrase(name)}", f"a {world.phrase(name)}, flat style"] * SUBJECT_SEEDS
    pictures = base.draw(pipe, prompts, list(range(len(prompts))))
    pipe.unload_lora_weights()
    return shares(encoder, pictures, [name] * len(prompts), ["flat"] * len(prompts))


def of_style(pipe, encoder, name):
    """One style LoRA on every known subject, a third of which it never saw."""
    pipe.load_lora_weights(OUT / "loras" / "styles" / f"{name}.safetensors", adapter_name="judged")
    words = list(world.KNOWN)[::40 if SHORT else 1]
    pictures = base.draw(pipe, [f"a {word}, {world.STYLE_PHRASE}" for word in words], list(range(len(words))))
    pipe.unload_lora_weights()
    return shares(encoder, pictures, words, [name] * len(words))


def row(name, value, key, floor):
    other = {"right_subject": "right_style", "right_style": "right_subject"}[key]
    mark = "yes" if value[key] >= floor else "**no**"
    return f"| {name} | {value[key]:.2f} | {floor:.2f} | {mark} | {value[other]:.2f} | {value['n']} |"


def table(title, key, rows):
    other = {"right_subject": "right style", "right_style": "right subject"}[key]
    head = f"| | {key.replace('_', ' ')} | floor | reached | {other} | n |\n|---|---|---|---|---|---|"
    return f"## {title}\n\n{head}\n" + "\n".join(rows) + "\n"


def report(found):
    """The readable page."""
    encoder_rows = [f"| {kind} | {v['subject']:.3f} | {v['style']:.3f} | {v['both']:.3f} | {v['held_out_subjects']:.3f} | {v['n']} |"
                    for kind, v in found["encoders"].items()]
    return "\n".join([
        "# Floors of the small world", "",
        "By the judge (zero-shot, see `judge_prompts` in `loramix/data/world.json`); 20 DDIM steps, guidance 3. Written by `training/floors.py`.", "",
        "## Encoders on drawings in new places and grounds, spoilt as in training", "",
        "| | right subject | right style | both | the held-out subjects | n |\n|---|---|---|---|---|---|", *encoder_rows, "",
        f"Drawings are of {len(encoders.SUBJECT_WORDS)} subjects in {len(encoders.STYLE_WORDS)} styles. On the base's own samples the judge's figures are "
        "those of the next table, "
        "the probe encoder's: " + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in found["base_by_probe"].items() if k != "n") + ".", "",
        table("Base: known subjects in known styles", "right_subject", [row("base", found["base"], "right_subject", BASE_FLOOR)]),
        table("Subject LoRAs", "right_subject", [row(n, v, "right_subject", SUBJECT_FLOOR) for n, v in found["subjects"].items()]),
        table("Style LoRAs on known subjects", "right_style", [row(n, v, "right_style", STYLE_FLOOR) for n, v in found["styles"].items()])])


def measure(only, found):
    """All floors, or only those of some LoRAs, the others kept from `found`."""
    pipe, judge = base.trained(), encoders.read("judge")
    if not only:
        found = {"encoders": {kind: encoders.accuracy(kind) for kind in encoders.KINDS},
                 "base": of_base(pipe, judge), "base_by_probe": of_base(pipe, encoders.read("probe"))}
    for kind, names, one in (("subjects", world.SUBJECTS, of_subject), ("styles", world.STYLES, of_style)):
        old = found.get(kind, {})
        found[kind] = {name: one(pipe, judge, name) if not only or name in only else old[name] for name in names}
    return found | {"floors": {"base": BASE_FLOOR, "subjects": SUBJECT_FLOOR, "styles": STYLE_FLOOR}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="LoRAs trained again; the other figures stay")
    only, path = parser.parse_args().only, NOTES / "floors.json"
    found = measure(only, json.loads(path.read_text()) if only else {})
    write_json(path, found)
    (NOTES / "floors.md").write_text(report(found))


if __name__ == "__main__":
    main()
