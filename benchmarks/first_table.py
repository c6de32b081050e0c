"""A first table of the rules on the small world's tuning pairs, judged zero-shot by the judge.

    python benchmarks/first_table.py [--split tuning] [--seeds 4] [--out benchmarks]

Writes first_table.csv (one line a picture), first_table.md (one line a rule) and first_table.png (a contact sheet, seed 0).
Right subject and right style: the judge's first choice of all its words. P(both): the mean over pictures of P(right subject) · P(right style)."""
import argparse
import csv
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import loramix
from loramix.drawing import contact_sheet, figure_png
from loramix.evaluate import judge, world_words, zero_shot
from loramix.probes import side_plan, discrepancy
from loramix.fusion import fuse
from loramix.lora import read_lora

METHODS = {
    "plain sum": lambda beta: dict(rule="direct"),
    "K-LoRA": lambda beta: dict(rule="klora"),
    "EST official": lambda beta: dict(rule="est", discrepancy=beta, parity="official"),
    "EST balanced": lambda beta: dict(rule="est", discrepancy=beta),
    "EST soft": lambda beta: dict(rule="est", discrepancy=beta, temperature=.5),
}


class Judge:
    "The judge of the small world: zero-shot probabilities of subject and style."

    def __init__(self, world):
        self.encoder, words = judge(world), world_words(world)
        self.words, self.texts = dict(subject=words.subjects, style=words.styles), dict(subject=words.subject_texts, style=words.style_texts)

    def __call__(self, images):
        "{kind: probabilities [images, words]}"
        return {kind: zero_shot(self.encoder, images, texts) for kind, texts in self.texts.items()}


def draw(world, prompt, seeds):
    "One picture for each seed, in one batch."
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return world.pipe(prompt, generator=generators, num_images_per_prompt=len(seeds), **world.run).images


def main(args):
    world, seeds, rows, sheet = loramix.demo(), range(args.seeds), [], {}
    world.pipe.set_progress_bar_config(disable=True)
    sees, pairs = Judge(world), [pair for pair in world.pairs if pair["split"] == args.split]

    @cache
    def alone(role, name, prompt):
        lora = read_lora((world.subjects if role == "subject" else world.styles)[name])
        with fuse(world.pipe, side_plan([lora], role), [lora]): return draw(world, prompt, seeds)

    def note(method, pair, images, beta):
        seen = sees(images)
        for seed, image in zip(seeds, images):
            facts = {}
            for kind in ("subject", "style"):
                entry = world.world[f"{kind}s"][pair[kind]]
                probabilities = seen[kind][seed]
                facts[kind] = (probabilities[sees.words[kind].index(entry["word"])].item(), sees.words[kind][probabilities.argmax()] == entry["word"])
            rows.append(dict(method=method, subject=pair["subject"], style=pair["style"], seed=seed, beta=round(beta, 4), right_subject=int(facts["subject"][1]), right_style=int(facts["style"][1]),
                             p_subject=round(facts["subject"][0], 5), p_style=round(facts["style"][0], 5)))
        sheet.setdefault((pair["subject"], pair["style"]), {})[method] = images[0]

    for pair in tqdm(pairs, desc="pairs"):
        files, prompt = (world.subjects[pair["subject"]], world.styles[pair["style"]]), world.prompt(pair["subject"], pair["style"])
        beta = discrepancy(world.pipe, *files, prompt, **world.run).value
        note("subject alone", pair, alone("subject", pair["subject"], prompt), beta)
        note("style alone", pair, alone("style", pair["style"], prompt), beta)
        for method, settings in METHODS.items():
            with loramix.mix(world.pipe, *files, **settings(beta)): note(method, pair, draw(world, prompt, seeds), beta)
    write(world, rows, sheet, args)


def write(world, rows, sheet, args):
    "The three files."
    out, name = Path(args.out), f"first_table{'' if args.split == 'tuning' else '_' + args.split}"
    with open(out/f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| rule | right subject | right style | both | P(both) |", "|---|---|---|---|---|"]
    for method in ("subject alone", "style alone", *METHODS):
        mine = [row for row in rows if row["method"] == method]
        mean = lambda value: np.mean([value(row) for row in mine])
        lines.append(f"| {method} | {mean(lambda r: r['right_subject']):.2f} | {mean(lambda r: r['right_style']):.2f} | {mean(lambda r: r['right_subject']*r['right_style']):.2f} | {mean(lambda r: r['p_subject']*r['p_style']):.3f} |")
    counts = len(rows)//(len(METHODS) + 2)
    text = f"{counts} pictures a row: {len(sheet)} {args.split} pairs × {args.seeds} seeds.\n\n" + "\n".join(lines) + "\n"
    (out/f"{name}.md").write_text(text, encoding="utf-8")
    columns = ["subject alone", "style alone", *METHODS, "truth"]
    shown = list(sheet)[::max(1, len(sheet)//12)][:12]
    grid = [[sheet[pair].get(column) or world.truth(*pair) for column in columns] for pair in shown]
    (out/f"{name}.png").write_bytes(figure_png(contact_sheet(grid, [" + ".join(pair) for pair in shown], columns)))
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--split", default="tuning", choices=["tuning", "held-out", "mixed"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", default="benchmarks")
    main(parser.parse_args())
