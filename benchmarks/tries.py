"""Ideas for a better rule that won on the tuning pairs and not on the held-out ones, kept so that nobody has to try them again.

    python benchmarks/tries.py [--seeds 4] [--splits tuning held-out]       # stop it and call it again at will; writes tries.csv and prints it

own streams     In a layer a LoRA adds ΔW x, and it was trained on the x that it brings about alone. So let each side run alone on the same noisy picture, keep what its LoRAs read in every
                layer, and add the effects in a run of the bare model: y = W0 x + k_c ΔW_c x_c + k_s ΔW_s x_s, in the conditional half of guidance. Four half calls a step in place of two.
lent attention  The same, and for the first part of the steps the queries and keys of self-attention are those of the subject's own run: where things lie is the subject's business."""
import argparse
from pathlib import Path

import pandas as pd
import torch

import loramix
from loramix import Method
from loramix.fusion import fuse
from loramix.merges import sides
from loramix.samplers import Attached, acting, constant_plan, lift, read
from loramix.voices import Voices
from loramix.weights import joined

HERE = Path(__file__).parent
REFERENCE = "NP-LoRA"


def side_factors(site, row, strengths, like):
    "What a side's LoRAs do in a layer, as one low-rank update (up, down); None where none of them holds the layer."
    acts = [(update, strength) for update, strength, on in zip(site.updates, strengths, row.tolist()) if on and update is not None]
    return joined(*zip(*acts), like.dtype, like.device) if acts else None


class Streams(Voices):
    "A fusion that runs each side alone, keeps what its LoRAs read in every layer, and adds their effects in a run of the bare model."
    effects, lent = (), 0.

    def attach(self):
        super().attach()
        strengths = next(iter(self.ready.values())).plan.strengths
        for site in self.editor.sites: self.handles.append(site.path[-1].register_forward_hook(torch.compiler.disable(self.tap(site, strengths))))

    def tap(self, site, strengths):
        "The hook of one layer: in a side's turn it reads, in the last turn it adds, or gives what the subject's turn gave."
        kept, heard, lendable = {}, {}, ".attn1." in site.name and site.name.endswith(("to_q", "to_k"))
        def hook(module, args, output):
            last = len(self.effects) + 1
            if not 1 <= self.turn <= last: return
            key = output.device, output.dtype
            if key not in kept: kept.clear(); kept[key] = [side_factors(site, row, strengths, output) for row in self.who[:-1]]
            factors, lends = kept[key], lendable and self.step < self.lent*self.rows.plan.steps
            if self.turn < last:
                if factors[self.turn - 1]: heard[self.turn - 1] = read(module, args[0], factors[self.turn - 1][1])
                if lends and self.turn == 1: heard["lent"] = output
                return
            lent = heard.pop("lent", None)
            for k in sorted(heard): output = output + self.effects[k]*lift(module, heard.pop(k), factors[k][0])
            return output if lent is None else lent
        return hook

    def asked(self, output): return super().asked(output)[-1:]


def own_streams(pipe, subject, style, *, effects, lent=0.):
    "Both sides' effects as they have them alone, times `effects`; for the share `lent` of the steps the subject's own attention."
    of = acting(sides(subject, style, None))
    fusion = fuse(pipe, lambda steps: constant_plan(of, steps), of.loras, kind=Streams)
    fusion.who = (*(torch.tensor([float(role == side) for role in of.roles]) for side in ("subject", "style")), torch.zeros(len(of.loras)))
    fusion.effects, fusion.lent, fusion.shares = tuple(effects), lent, (1.,)
    return Attached(fusion, "own streams")


METHODS = [
    Method("np", label=REFERENCE),
    Method("np", dict(conditional_only=True), label="NP-LoRA, conditional half only"),
    Method("est soft", dict(conditional_only=True), label="soft EST, conditional half only"),
    Method("streams", dict(effects=[1., 1.25]), label="own streams", make=own_streams),
    Method("streams lent", dict(effects=[1., 1.35], lent=.5), label="own streams, lent attention", make=own_streams),
]


def main(args):
    world, tables = loramix.demo(), []
    for split in args.splits:
        made = loramix.sweep(METHODS, split, args.seeds, world=world, store=args.store, batch=4)
        tables.append(made.leaderboard(REFERENCE).reset_index().assign(split=split))
    table = pd.concat(tables)
    if made.crew.main:
        table.to_csv(args.out/"tries.csv", index=False)
        print(table[["split", "method", "n", "right_subject", "right_style", "both", "p_both", "p_both_low", "p_both_high", "difference", "difference_low", "difference_high", "seconds"]].round(3).to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", nargs="+", default=["tuning", "held-out"], choices=("tuning", "held-out", "mixed"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--store", type=Path, default=HERE/"tries.sqlite")
    parser.add_argument("--out", type=Path, default=HERE)
    main(parser.parse_args())
