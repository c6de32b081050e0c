"""Every method on one table: held-out and tuning pairs of the small world apart, eight seeds, P(both) by the judge.

    python benchmarks/leaderboard.py                    # stop it and call it again at will; accelerate launch --multi_gpu --num_processes N … shares the work
    python benchmarks/leaderboard.py --cost             # time and memory only, on an idle machine; the table takes them up the next time
    python benchmarks/leaderboard.py --grid             # the grid search that gave GRID_FOUND: tuning pairs, the probe encoder

Writes leaderboard.csv (a line for each split and method), leaderboard.md, leaderboard.png (held-out pairs, seed 0), leaderboard_pictures.csv.gz (a line a picture)
and leaderboard_cost.csv. Pictures are kept in leaderboard.sqlite (not in the repository). A new method is a line in METHODS."""
import argparse
from pathlib import Path

import pandas as pd

import loramix
from loramix import Method
from loramix.drawing import figure_png
from loramix.sweeps import attached, ceiling_line, cost, markdown, sheet

HERE = Path(__file__).parent
REFERENCE = "NP-LoRA"                                                             # the best published static merge; every other is compared with it
SPLITS = {"held-out": "Held-out pairs: subjects and styles that no setting was chosen on", "tuning": "Tuning pairs", "mixed": "Mixed pairs"}
COST_PAIR = ("rocket", "stamp")
GRID = dict(strengths=([.5, .75, 1., 1.25], [.5, .75, 1., 1.25]))                 # factors of subject and style
GRID_FOUND = [1., 1.25]


def calibrated(pipe, subject, style, *, method, prompt, run, **settings):
    "A sampler that calibrates each LoRA on a prompt of its own: the pair's without the style, and a known subject in the style."
    what, how = prompt.split(", ")
    return attached(pipe, subject, style, method=method, prompt=prompt, run=run, prompts=[what, f"a penguin, {how}"], **settings)


def named(label, name, **settings): return Method(name, settings, label=label)


METHODS = [
    named("subject LoRA alone", "subject"),
    named("style LoRA alone", "style"),
    # static merges
    named("plain sum", "direct"),
    named("plain sum, weights by grid search", "direct", strengths=GRID_FOUND),
    named("weight average", "average"),
    named("SVD merge", "svd"),
    named("TIES", "ties"),
    named("DARE", "dare"),
    named("DARE-TIES", "dare_ties"),
    named("magnitude pruning", "prune"),
    named("B-LoRA filter", "blora"),
    named("NP-LoRA", "np"),
    Method("ssr", dict(method="ssr"), label="SSR-Merge", make=calibrated),
    Method("zip", dict(method="zip"), label="ZipLoRA", make=calibrated),
    # step by step
    named("K-LoRA", "klora"),
    named("K-LoRA s*", "klora s*"),
    named("uniform Top-K", "topk"),
    named("EST-LoRA, authors' program", "est official"),
    named("EST-LoRA", "est"),
    named("EST-LoRA s*", "est s*"),
    named("LoRA Switch", "switch"),
    named("role windows", "windows"),
    named("asymmetric guidance", "acfg"),
    named("LoRA Composite", "composite"),
    named("dynamic selection", "dynamic"),
    # soft choice, guidance halves, three voices
    named("soft EST", "est soft"),
    named("plain sum, conditional half only", "direct", conditional_only=True),
    named("soft EST, conditional half only", "est soft", conditional_only=True),
    named("NP-LoRA, conditional half only", "np", conditional_only=True),
    Method("trio", dict(), label="trio (three voices)", make=loramix.trio),
]
SHOWN = ["subject LoRA alone", "style LoRA alone", "plain sum", "NP-LoRA", "ZipLoRA", "K-LoRA", "EST-LoRA", "soft EST", "soft EST, conditional half only", "NP-LoRA, conditional half only", "trio (three voices)"]


def main(args):
    world, methods = loramix.demo(), [m for m in METHODS if not args.only or m.title in args.only]
    if args.cost:
        table = cost(methods, *COST_PAIR, world=world, rounds=args.rounds)
        table.to_csv(args.out/"leaderboard_cost.csv")
        return print(table.round(3).to_string())
    if args.grid: return print(loramix.tune("direct", GRID, sampler="grid", world=world, store=args.store, batch=args.batch))
    made = {split: loramix.sweep(methods, split, args.seeds, world=world, store=args.store, batch=args.batch) for split in args.splits}
    if next(iter(made.values())).crew.main: write(made, args.out)


def write(made, out):
    "The table of each split, the pictures' lines and the contact sheet."
    text, lines, pictures = [], [], []
    for split, one in made.items():
        table = one.leaderboard(REFERENCE if REFERENCE in [m.title for m in one.methods] else None)
        pictures.append(one.frame)
        text.append(f"## {SPLITS[split]}\n\n{_words(one)}\n\n{markdown(_with_cost(table.drop(columns='seconds'), out))}")
        lines.append(_with_cost(table, out).reset_index().assign(split=split))
        if split == "held-out": (out/"leaderboard.png").write_bytes(figure_png(sheet(one, methods=[t for t in SHOWN if t in table.index])))
    pd.concat(lines).to_csv(out/"leaderboard.csv", index=False)
    pd.concat(pictures).to_csv(out/"leaderboard_pictures.csv.gz", index=False)
    (out/"leaderboard.md").write_text("# Leaderboard\n\nWritten by `benchmarks/leaderboard.py`.\n\n" + "\n".join(text), encoding="utf-8")
    print("\n".join(text))


def _words(one):
    "What the table is made of, and the ceiling."
    titles = {m.title for m in one.methods}
    top = f" The ceiling, P(right subject) of the subject LoRA alone times P(right style) of the style LoRA alone, is {ceiling_line(one.frame, *SHOWN[:2])}." if set(SHOWN[:2]) <= titles else ""
    return (f"{len(one.pairs)} pairs × {len(one.seeds)} seeds = {len(one.pairs)*len(one.seeds)} pictures a method, the same pairs and seeds for all; 20 steps, guidance 3. Brackets are 95 % intervals over other subjects *and* other styles. "
            f"The difference is that of P(both) to {REFERENCE}, paired; the verdict goes by its interval.{top}")


def _with_cost(table, out):
    "The table with time and memory, where they have been measured."
    path = out/"leaderboard_cost.csv"
    if not path.is_file(): return table
    return table.join(pd.read_csv(path).set_index("method")[["time_ratio", "memory_ratio", "making_ready"]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", default=["held-out", "tuning"], choices=list(SPLITS))
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="labels of METHODS; default: all")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="seeds drawn in one call")
    parser.add_argument("--cost", action="store_true", help="measure time and memory instead")
    parser.add_argument("--grid", action="store_true", help="search the weights of the sum instead")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of --cost")
    parser.add_argument("--store", type=Path, default=HERE/"leaderboard.sqlite")
    parser.add_argument("--out", type=Path, default=HERE)
    main(parser.parse_args())
