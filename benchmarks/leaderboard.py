"""Every method on one table: held-out and tuning pairs of the small world apart, eight seeds, and 288 pairs of a larger world; P(both) by the judge.

    python benchmarks/leaderboard.py                    # stop it and call it again at will; accelerate launch --multi_gpu --num_processes N … shares the work
    python benchmarks/leaderboard.py --cost             # time and memory only; the tables that stand take them up
    python benchmarks/leaderboard.py --grid             # the grid search that gave GRID_FOUND: tuning pairs, the probe encoder
    python benchmarks/leaderboard.py --larger           # 24 subjects × 12 styles that do not ship and that no setting was chosen on, one seed, by a judge of their own

The larger world is made by `python training/data.py; python training/shelf.py subjects & python training/shelf.py styles; wait; python training/shelf.py judge; python
training/shelf.py world`, an hour of two cores. Seven held-out subjects × five held-out styles leave an interval of ± .15; 24 × 12 leave ± .10.

Time is measured against one merged LoRA, and against the same again (A/A: what the clock itself is worth), all three on pipelines of their own, side by side, a step of each in turn (needs greenlet): a slow moment of the
machine then slows all three alike. A picture's time is the sum over its steps of each step's median over the rounds; the interval is a bootstrap over rounds. `editing` needs no second arm: the time of a
picture over that time without what loramix does in it (find the step's row, write the layers that change). Memory and making ready come from `loramix.cost`.

Writes leaderboard.csv (a line for each split and method), leaderboard.md, leaderboard.png (held-out pairs, seed 0), leaderboard_pictures.csv.gz (a line a picture)
and leaderboard_cost.csv; of the larger world larger.csv and so on. Pictures are kept in leaderboard.sqlite, larger.sqlite (not in the repository). A new method is a line in METHODS."""
import argparse
import json
import random
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import loramix
from fusion_speed import timed_in_turn
from loramix import Method
from loramix.drawing import figure_png
from loramix.sweeps import attached, ceiling_line, cost, leaderboard, made_for, markdown, merged, sheet

HERE = Path(__file__).parent
REFERENCE = "NP-LoRA"                                                             # the best published static merge; every other is compared with it
SPLITS = {"held-out": "Held-out pairs: subjects and styles that no setting was chosen on", "tuning": "Tuning pairs", "mixed": "Mixed pairs", "shelf": "The larger world: subjects and styles that no setting was chosen on"}
COST_PAIR = ("rocket", "stamp")
GRID = dict(strengths=([.5, .75, 1., 1.25], [.5, .75, 1., 1.25]))                 # factors of subject and style
GRID_FOUND = [1., 1.25]
TOGETHER = dict(rule="est", discrepancy=.5, temperature=.5, balance="magnitude", together=.4, conditional_only=True)


def calibrated(pipe, subject, style, *, method, prompt, run, **settings):
    "A sampler that calibrates each LoRA on a prompt of its own: the pair's without the style, and a known subject in the style."
    what, how = prompt.split(", ")
    return attached(pipe, subject, style, method=method, prompt=prompt, run=run, prompts=[what, f"a penguin, {how}"], **settings)


def projected(pipe, subject, style, **settings):
    "A mix whose subject is held back from the style's inputs, as in NP-LoRA."
    return loramix.mix(pipe, loramix.merges.project(subject, style), style, **settings)


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
    # both in full first, then the contest
    named("both, then soft EST, conditional half only", "est soft", together=.4, conditional_only=True),
    Method("both, then soft EST, projected, conditional half only", TOGETHER, make=projected, label="both, then soft EST, projected, conditional half only"),
]
SHOWN = ["subject LoRA alone", "style LoRA alone", "plain sum", "NP-LoRA", "ZipLoRA", "asymmetric guidance", "K-LoRA", "EST-LoRA", "soft EST", "soft EST, conditional half only", "NP-LoRA, conditional half only", "trio (three voices)", "both, then soft EST, conditional half only"]


def main(args):
    methods = [m for m in METHODS if not args.only or m.title in args.only]
    if args.cost: return costs(methods, args.rounds, args.out/"leaderboard_cost.csv")
    world = larger() if args.larger else loramix.demo()
    name = "larger" if args.larger else "leaderboard"
    store = args.store or HERE/f"{name}.sqlite"
    if args.grid: return print(loramix.tune("direct", GRID, sampler="grid", world=world, store=store, batch=args.batch))
    splits, seeds = (["shelf"], args.seeds or 1) if args.larger else (args.splits, args.seeds or 8)
    batch = args.batch or (1 if args.larger else 4)
    if args.keep and not (args.out/f"{name}_pictures.csv.gz").is_file(): raise FileNotFoundError(f"--keep needs the lines of an earlier table, {args.out/name}_pictures.csv.gz.")
    made = {split: loramix.sweep(methods, split, seeds, world=world, store=store, batch=batch) for split in splits}
    if next(iter(made.values())).crew.main: write(made, args.out, name, args.keep)


def costs(methods, rounds, path):
    "Time, memory and making ready of these methods; a line of the file for each, and other methods' lines stay."
    torch.set_num_threads(1)                                                      # two threads wait for each other wherever one of them is interrupted
    world, draw, beside = quiet(), random.Random(0), {name: arm(Method(name, make=merged)) for name in ("merged", "again")}
    lines = pd.read_csv(path).set_index("method").to_dict("index") if path.is_file() else {}
    for method in methods:
        drawn = arm(method)
        line = lines[method.title] = (time_line(beside | {"method": drawn}, world.run, rounds, draw) | editing(drawn, world.run, rounds)
            | cost([method], *COST_PAIR, world=world, rounds=1).loc[method.title, ["memory_ratio", "making_ready"]].to_dict())
        pd.DataFrame([dict(method=m.title, **lines[m.title]) for m in METHODS if m.title in lines]).astype({"rounds": int}).to_csv(path, index=False)
        print(f"{method.title}: " + ", ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
    for name in ("leaderboard", "larger"):
        if (path.parent/f"{name}_pictures.csv.gz").is_file(): write({}, path.parent, name, keep=True)


def quiet():
    "The small world, loaded anew, without progress bars."
    world = loramix.demo()
    world.pipe.set_progress_bar_config(disable=True)
    return world


def arm(method):
    "A method at work on a small world of its own: what draws a picture with it."
    world = quiet()
    return partial(made_for(method, world, *COST_PAIR), world.prompt(*COST_PAIR), seed=0)


def editing(drawn, run, rounds):
    "Layer edits of a picture, and the time of a picture over that time without the library's own (median of the rounds, highest); nothing for what is no fusion."
    fusion, ratios, spent = getattr(drawn.func, "fusion", None), [], 0.
    if fusion is None: return {}
    def timed(work):
        def within(*args):
            nonlocal spent
            start = time.perf_counter()
            result = work(*args)
            spent += time.perf_counter() - start
            return result
        return within
    fusion.go_to, fusion.show, before = timed(fusion.go_to), timed(fusion.show), fusion.changes
    for _ in range(rounds):
        start, spent = time.perf_counter(), 0.
        drawn(**run)
        took = time.perf_counter() - start
        ratios.append(took/(took - spent))
    return dict(edits=(fusion.changes - before)/rounds, editing=np.median(ratios), editing_high=max(ratios))


def time_line(arms, run, rounds, draw):
    "Seconds of a picture, and ratios to the merged LoRA with 95 % intervals."
    run, took = dict(run), {name: [] for name in arms}
    steps = run.pop("num_inference_steps")
    for _ in range(rounds + 1):
        for name, turns in timed_in_turn(arms, run, steps, "cpu", draw).items(): took[name].append([clock for clock, _ in turns])
    took = {name: np.array(turns[1:]) for name, turns in took.items()}               # the first round warms up
    line = dict(seconds=np.median(took["method"], 0).sum(), rounds=rounds)
    for name, key in (("method", "time_ratio"), ("again", "again")):
        ratios = [np.median(took[name][some], 0).sum()/np.median(took["merged"][some], 0).sum() for some in [np.arange(rounds), *np.random.default_rng(0).integers(0, rounds, (2000, rounds))]]
        line |= {key: ratios[0], f"{key}_low": np.quantile(ratios[1:], .025), f"{key}_high": np.quantile(ratios[1:], .975)}
    return line


def larger():
    "The larger world, its own judge beside it."
    sys.path.append(str(HERE.parent/"training"))
    from shelf import SHELF
    return loramix.testbed.Demo(loramix.demo().pipe, json.loads((SHELF/"world.json").read_text(encoding="utf-8")), SHELF)


def write(made, out, name, keep):
    "The table of each split, the pictures' lines and the contact sheet."
    frames = {split: one.frame.assign(split=split) for split, one in made.items()}
    if keep: frames = with_earlier(frames, pd.read_csv(out/f"{name}_pictures.csv.gz"))
    text, lines = [], []
    for split, frame in frames.items():
        table = leaderboard(frame, REFERENCE if REFERENCE in set(frame.method) else None)
        text.append(f"## {SPLITS[split]}\n\n{_words(frame)}\n\n{markdown(_with_cost(table.drop(columns='seconds'), out))}")
        lines.append(_with_cost(table, out).reset_index().assign(split=split))
    for split in {"held-out", "shelf"} & set(made):
        if not keep: (out/f"{name}.png").write_bytes(figure_png(sheet(made[split], methods=[t for t in SHOWN if t in {m.title for m in made[split].methods}])))
    pd.concat(lines).to_csv(out/f"{name}.csv", index=False)
    pd.concat(frames.values()).to_csv(out/f"{name}_pictures.csv.gz", index=False, compression=dict(method="gzip", mtime=0))     # the same lines, the same file
    (out/f"{name}.md").write_text("# Leaderboard\n\nWritten by `benchmarks/leaderboard.py`.\n\n" + "\n".join(text), encoding="utf-8")
    print("\n".join(text))


def with_earlier(frames, known):
    "Each split's lines, with those of an earlier table for methods and splits that were not drawn now. `ValueError` where they are of other pairs or seeds."
    found, known = {}, known[known.method.isin([m.title for m in METHODS])]
    for split in SPLITS:
        drawn, lines = frames.get(split), known[known.split == split]
        found[split] = lines if drawn is None else pd.concat([drawn, lines[~lines.method.isin(drawn.method)]])
        of = {title: frozenset(zip(one.subject, one["style"], one.seed)) for title, one in found[split].groupby("method")}
        if len(set(of.values())) > 1: raise ValueError(f"The lines to keep of {split!r} are of other pairs or seeds than those drawn now; ask for the same.")
    return {split: frame for split, frame in found.items() if len(frame)}


def _words(frame):
    "What the table is made of, and the ceiling."
    n, pairs, seeds = frame.groupby("method").size().max(), len(frame[["subject", "style"]].drop_duplicates()), frame.seed.nunique()
    top = f" The ceiling, P(right subject) of the subject LoRA alone times P(right style) of the style LoRA alone, is {ceiling_line(frame, *SHOWN[:2])}." if set(SHOWN[:2]) <= set(frame.method) else ""
    return (f"{pairs} pairs × {seeds} seed{'s'*(seeds > 1)} = {n} pictures a method, the same pairs and seeds for all; 20 steps, guidance 3. Brackets are 95 % intervals over other subjects *and* other styles. "
            f"The difference is that of P(both) to {REFERENCE}, paired; the verdict goes by its interval.{top}")


def _with_cost(table, out):
    "The table with time and memory, where they have been measured."
    path = out/"leaderboard_cost.csv"
    if not path.is_file(): return table
    return table.join(pd.read_csv(path).set_index("method")[["time_ratio", "memory_ratio", "making_ready"]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--larger", action="store_true", help="the larger world instead of the small one")
    parser.add_argument("--splits", nargs="+", default=["held-out", "tuning"], choices=[split for split in SPLITS if split != "shelf"])
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="labels of METHODS; default: all")
    parser.add_argument("--keep", action="store_true", help="with --only: the other methods' lines stay in the table as they are (no contact sheet)")
    parser.add_argument("--seeds", type=int, help="8, or 1 of the larger world")
    parser.add_argument("--batch", type=int, help="seeds drawn in one call: 4, or 1 of the larger world; one picture may differ by a level with another")
    parser.add_argument("--cost", action="store_true", help="measure time and memory instead")
    parser.add_argument("--grid", action="store_true", help="search the weights of the sum instead")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of --cost; 60 tell two from one per cent")
    parser.add_argument("--store", type=Path, help="where the pictures are kept")
    parser.add_argument("--out", type=Path, default=HERE)
    main(parser.parse_args())
