"""Rules on a larger world: 288 pairs of 24 subjects and 12 styles that do not ship and that no setting of these rules was chosen on; by a judge of its own.

    python training/data.py; python training/shelf.py subjects & python training/shelf.py styles; wait
    python training/shelf.py judge; python training/shelf.py world
    python benchmarks/larger.py draw --part 0 --of 2 & python benchmarks/larger.py draw --part 1 --of 2; wait    # the pairs shared by two processes
    python benchmarks/larger.py table                                                                           # writes larger.csv

Seven held-out subjects × five held-out styles (leaderboard.py) leave an interval of ± .15; 24 × 12 leave ± .10. The rules are those of gates.py, drawn as there."""
import argparse
import json
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import gates
import shelf
from base import trained
from loramix import evaluate
from loramix.testbed import Demo

HERE, REFERENCE = Path(__file__).parent, "NP-LoRA"   # the best published rule of the leaderboard
RULES = {  # name: (rule, the same in the unconditional half)
    REFERENCE: (gates.NP, True),
    "soft EST, conditional half only": (gates.soft_est, False),
    "both, then soft EST": (gates.both_then_est, False),
    "plain sum": (gates.constant(1, 1, 0), True),
    "NP-LoRA, conditional half only": (gates.NP, False),
    "subject LoRA alone": (gates.constant(1, 0, 0), True),
    "style LoRA alone": (gates.constant(0, 1, 0), True),
    "EST-LoRA": (partial(gates.soft_est, temperature=1e-6), True),   # one-hot
}
COLUMNS = ["right_subject", "right_style", "both", "p_both"]


@torch.no_grad()
def draw(part, of, seeds, only):
    "A line for each picture of this process's share of the pairs; one file for each rule."
    shelf.furnish()
    fused = gates.Fused(trained())
    sides = [gates.Side(shelf.SHELF/"loras"/kind, fused.names) for kind in ("subjects", "styles")]
    cases = [(subject, style, seed) for seed in range(seeds) for subject in shelf.NEW for style in shelf.STYLES][part::of]
    metric = evaluate.both_metric(Demo(fused.pipe, json.loads((shelf.SHELF/"world.json").read_text()), shelf.SHELF))
    for name, (rule, both) in RULES.items():
        if only and name not in only: continue
        found = gates.measured(fused, sides, cases, name, rule, metric, rule if both else None)
        found.to_csv(shelf.SHELF/f"larger-{list(RULES).index(name)}-{part}.csv", index=False)
        print(name, found[COLUMNS].mean().round(3).to_dict(), flush=True)


def table():
    "The pictures' lines together, the means, and P(both) beside the reference with 95 % intervals over other subjects and other styles."
    rows = pd.concat([pd.read_csv(path) for path in sorted(shelf.SHELF.glob("larger-*.csv"))])
    rows.round(4).to_csv(HERE/"larger.csv", index=False)
    by = {name: one.sort_values(["subject", "style", "seed"]) for name, one in rows.groupby("method")}
    print(rows.groupby("method")[COLUMNS].mean().round(3).assign(n=rows.groupby("method").size()).to_string())
    reference = by[REFERENCE]
    for name, one in by.items():
        if name != REFERENCE: print(f"{name} − {REFERENCE}, P(both):", evaluate.compare(one.p_both.values, reference.p_both.values, one.subject.values, one["style"].values))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("draw", "table"))
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], metavar="RULE", help="names of RULES; default: all")
    args = parser.parse_args()
    table() if args.what == "table" else draw(args.part, args.of, args.seeds, args.only)
