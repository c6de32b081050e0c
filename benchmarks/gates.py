"""What does the truth say that each side should do, in which layer, at which noise? A rule fitted to true pictures of other subjects and styles.

    python training/data.py; python training/shelf.py subjects & python training/shelf.py styles; wait     # LoRAs to learn from, once
    python benchmarks/gates.py fit                  # fits the gates on 20 × 9 pairs of that shelf, some minutes; writes gates.safetensors (gates.log is of the run that made it)
    python benchmarks/gates.py errors               # the denoising error on true pictures, by noise, of this and other rules
    python benchmarks/gates.py table [--seeds 4]    # needs none of the above: P(both) of the fitted gates beside NP-LoRA; writes gates.csv

In each layer, conditional half of guidance only:   y = W0 x + c ΔW_c (x − m P_s x) + s ΔW_s (x − n P_c x),   P the projector on what the other LoRA reads.
c, s, m, n are piecewise linear in the noise level with five knots for each layer, c and s also follow the log energy ratio of the pair. They are the same for every pair, as
α and γ are: nothing is trained when two LoRAs are mixed. NP-LoRA is c = s = 1, m = 1/3, n = 0. Fitted by the denoising error on true pictures; no judge, no probe encoder."""
import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent/"training"))
import base
import loras
import shelf
import world

import loramix
from loramix import evaluate

RANK, KNOTS, LEVELS = 16, (0., .2, .45, .7, 1.), (950, 850, 700, 550, 400, 250, 100)
GATES = HERE/"gates.safetensors"


def two_factors(path, names):
    "A LoRA as B A in each layer: rows of A orthonormal, both padded to RANK."
    layers = loramix.read_lora(path).layers
    for name in names:
        update = layers[f"unet.{name}"]
        up, down = update.factors()
        q, r = torch.linalg.qr(down.T)
        spare = RANK - q.shape[1]
        yield F.pad(q.T, (0, 0, 0, spare)), F.pad(update.scale*up@r.T, (0, spare))


class Side:
    "All LoRAs of one side, stacked: A [K, RANK, in] and B [K, out, RANK] of each layer, log energies [K, layers]."
    def __init__(self, folder, names):
        files = sorted(folder.glob("*.safetensors"))
        self.keys, each = [file.stem for file in files], [list(two_factors(file, names)) for file in files]
        self.A, self.B = ([torch.stack([one[i][part] for one in each]) for i in range(len(names))] for part in (0, 1))
        self.energy = torch.stack([B.pow(2).sum((1, 2)) for B in self.B], 1).log()


class Gates(nn.Module):
    "c, s, m, n of every layer at a noise level, for pairs whose energies are known."
    def __init__(self, layers):
        super().__init__()
        self.at = nn.ParameterList([torch.full((layers, len(KNOTS)), value) for value in (1., 1., 1/3, 0.)])
        self.contest = nn.Parameter(torch.zeros(2, 2, len(KNOTS)))   # (side, (in the layer, in all), knot)

    def forward(self, own, other, t):
        "Four [B, layers] for log energies `own`, `other` [B, layers] at steps `t` [B]."
        knots, u = torch.tensor(KNOTS), t.float()/1000
        i = torch.bucketize(u, knots[1:-1], right=True)
        w = (u - knots[i])/(knots[i + 1] - knots[i])
        hat = F.one_hot(i, len(KNOTS))*(1 - w)[:, None] + F.one_hot(i + 1, len(KNOTS))*w[:, None]
        total = (own.logsumexp(1) - other.logsumexp(1))[:, None]/2
        layer, (c, s, m, n) = (own - other)/2 - total, (hat@values.T for values in self.at)
        (c1, c2), (s1, s2) = ((hat@k.T).T[..., None] for k in self.contest)
        return c*torch.exp(c1*layer + c2*total), s*torch.exp(s1*layer + s2*total), m, n


class Fused:
    "The small world's denoiser with every picture of a batch under its own pair."
    def __init__(self, pipe):
        self.pipe, self.unet, self.now = pipe, pipe.unet.requires_grad_(False), None
        layers = {name: layer for name, layer in pipe.unet.named_modules() if isinstance(layer, nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
        self.names = list(layers)
        for i, layer in enumerate(layers.values()): layer.register_forward_hook(self.hook(i))

    def hook(self, i):
        def add(layer, args, output):
            if self.now is None: return
            (subjects, styles), (c, s), gates = self.now
            k_c, k_s, m, n = (gate[:, i, None, None] for gate in gates)
            A_c, A_s = subjects.A[i][c], styles.A[i][s]
            read_c, read_s, meet = args[0]@A_c.mT, args[0]@A_s.mT, A_c@A_s.mT
            return output + k_c*(read_c - m*read_s@meet.mT)@subjects.B[i][c].mT + k_s*(read_s - n*read_c@meet)@styles.B[i][s].mT
        return add

    def __call__(self, noisy, t, states, rule, sides, pairs):
        "Predicted velocity [B, 6, 16, 16]; `rule(E_c, E_s, t)` gives the four gates, None: no LoRA acts."
        if rule is None: return self.unet(noisy, t, encoder_hidden_states=states).sample
        self.now = sides, pairs, rule(sides[0].energy[pairs[0]], sides[1].energy[pairs[1]], t)
        try: return self.unet(noisy, t, encoder_hidden_states=states).sample
        finally: self.now = None

    @torch.no_grad()
    def states(self, captions): return base.encode_text(self.pipe.text_encoder, self.pipe.tokenizer, captions)


def constant(c, s, m):
    "A rule that is the same everywhere."
    return lambda own, other, t: tuple(torch.full(own.shape, float(value)) for value in (c, s, m, 0))


def halfway(gates, other):
    "The mean of two rules. A fit on few styles goes too far, so half of the way from NP-LoRA is better by the probe encoder on tuning pairs."
    return lambda *seen: tuple((a + b)/2 for a, b in zip(gates(*seen), other(*seen)))


def soft_est(own, other, t, alpha=1.5, beta=.5, temperature=.5):
    "Soft EST by energies that are shares of each file's own, as `balance=\"magnitude\"` has them; p by noise level."
    share = own.sub(other).div(2).sub(((own/2).exp().sum(1)/(other/2).exp().sum(1)).log()[:, None]).sub((alpha*(1 - t/1000) + beta).log()[:, None]).div(temperature).sigmoid()
    most = torch.maximum(share, 1 - share)
    return share/most, (1 - share)/most, 0*share, 0*share


NP, REFERENCE = constant(1, 1, 1/3), "NP-LoRA, conditional half only"


def both_then_est(own, other, t, until=600):
    "Not fitted: both LoRAs in full above noise level `until`, where the truth wants them so, soft EST below; NP's projection throughout."
    early = (t >= until)[:, None]
    c, s, m, n = soft_est(own, other, t)
    return torch.where(early, 1., c), torch.where(early, 1., s), m + 1/3, n


def prompt(subject, ground="white"): return f"a {world.phrase(subject)}, {world.STYLE_PHRASE}{world.ground_phrase(ground)}"


def truths(fused, sides, subjects, styles, views, seed):
    "True pictures of every pair: latents [n, 6, 16, 16], captions, places in the two sides [n]."
    latents, captions, pairs = [], [], []
    for i, subject in enumerate(subjects):
        for j, style in enumerate(styles):
            drawn, grounds = base.views(fused.pipe.vae, world.EMOJI.get(subject, subject), style, views, torch.Generator().manual_seed(seed*100_003 + 997*i + j), white=.75,
                                        without=loras.HARD_GROUNDS.get(style, ()))
            latents.append(drawn)
            captions += [prompt(subject, ground) for ground in grounds]
            pairs += [(sides[0].keys.index(subject), sides[1].keys.index(style))]*views
    return torch.cat(latents), captions, torch.tensor(pairs).T


def fit(fused, sides, data, steps=500, batch=16, rate=.02):
    "Gates by Adam on the denoising error of true pictures; the running mean of the last steps."
    latents, captions, pairs = data
    unique = sorted(set(captions))
    words, where = torch.cat([fused.states(unique[k:k + 64]) for k in range(0, len(unique), 64)]), torch.tensor([unique.index(caption) for caption in captions])
    gates, scheduler, errors = Gates(len(fused.names)), base.make_scheduler(), []
    optimiser = torch.optim.Adam(gates.parameters(), lr=rate, betas=(.9, .99))
    mean = [p.detach().clone() for p in gates.parameters()]
    for step in range(steps):
        generator = torch.Generator().manual_seed(step + 17)
        rows, t = torch.randint(len(latents), (batch,), generator=generator), base.times(batch, generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        optimiser.param_groups[0]["lr"] = rate*min(1, (step + 1)/20)*min(1, max(.02, (1 - step/steps)/.4))
        with torch.autocast("cpu", torch.bfloat16):
            guess = fused(scheduler.add_noise(latents[rows], noise, t), t, words[where[rows]], gates, sides, pairs[:, rows])
        loss = F.mse_loss(guess.float(), scheduler.get_velocity(latents[rows], noise, t))
        optimiser.zero_grad(); loss.backward(); optimiser.step()
        with torch.no_grad():
            for kept, value in zip(mean, gates.parameters()): kept.lerp_(value, .02 if step > 50 else .5)
        errors.append(loss.item())
        if (step + 1) % 50 == 0: print(f"step {step + 1}/{steps} error {sum(errors[-50:])/50:.4f}", flush=True)
    with torch.no_grad():
        for kept, value in zip(mean, gates.parameters()): value.copy_(kept)
    return gates


@torch.no_grad()
def error(fused, sides, data, rule):
    "Mean squared error of the velocity on true pictures, [levels]."
    latents, captions, pairs = data
    scheduler, found = base.make_scheduler(), []
    for level in LEVELS:
        t, noise = torch.full((len(latents),), level), torch.randn(latents.shape, generator=torch.Generator().manual_seed(level))
        noisy, goal = scheduler.add_noise(latents, noise, t), scheduler.get_velocity(latents, noise, t)
        parts = [fused(noisy[rows], t[rows], fused.states([captions[i] for i in rows]), rule, sides, pairs[:, rows]) for rows in torch.arange(len(latents)).split(32)]
        found.append(F.mse_loss(torch.cat(parts), goal).item())
    return found


@torch.no_grad()
def draw(fused, sides, cases, rule, guidance=3., steps=20):
    "One picture for each (subject, style, seed), 32 at a time; no LoRA acts in the unconditional half."
    pictures = []
    for k in range(0, len(cases), 32):
        part = cases[k:k + 32]
        pairs = torch.tensor([(sides[0].keys.index(subject), sides[1].keys.index(style)) for subject, style, _ in part]).T
        states, nothing = fused.states([prompt(subject) for subject, _, _ in part]), fused.states([""]).expand(len(part), -1, -1)
        x, scheduler = torch.cat([torch.randn(1, 6, 16, 16, generator=torch.Generator().manual_seed(seed)) for *_, seed in part]), base.make_scheduler()
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            bare = fused(x, t.expand(len(part)), nothing, None, sides, pairs)
            x = scheduler.step(bare + guidance*(fused(x, t.expand(len(part)), states, rule, sides, pairs) - bare), t, x).prev_sample
        seen = fused.pipe.vae.decode(x/fused.pipe.vae.config.scaling_factor).sample.div(2).add(.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().byte()
        pictures += [Image.fromarray(one) for one in seen.numpy()]
    return pictures


def table(fused, sides, gates, seeds):
    "P(both) of these rules beside NP-LoRA, held-out pairs and all others apart, by the judge; a row a picture."
    half, metric, rows = world.halves(), evaluate.both_metric(loramix.demo()), []
    cases = [(subject, style, seed) for subject in sides[0].keys for style in sides[1].keys for seed in range(seeds)]
    for name, rule in ((REFERENCE, NP), ("fitted gates", gates), ("half of the way to them", halfway(gates, NP)), ("both, then soft EST", both_then_est)):
        numbers = metric(draw(fused, sides, cases, rule), [evaluate.Case(subject, style, "", seed) for subject, style, seed in cases])
        rows.append(pd.DataFrame(numbers).assign(method=name, subject=[c[0] for c in cases], style=[c[1] for c in cases], seed=[c[2] for c in cases]))
    rows = pd.concat(rows)
    rows["split"] = [half[s] if half[s] == half[t] else "mixed" for s, t in zip(rows.subject, rows["style"])]
    return rows


def main(args):
    shelf.furnish()
    fused = Fused(base.trained())
    ours, theirs = ([Side(folder/"loras"/kind, fused.names) for kind in ("subjects", "styles")] if needed else None
                    for folder, needed in ((shelf.SHELF, args.what != "table"), (loramix.demo().folder, args.what != "fit")))
    left = ours and (ours[0].keys[::6], ours[1].keys[::5])   # left out of the fit
    if args.what == "fit":
        taught = [[key for key in side.keys if key not in out] for side, out in zip(ours, left)]
        gates = fit(fused, ours, truths(fused, ours, *taught, 3, 11), args.steps)
        return save_file({key: value.contiguous() for key, value in gates.state_dict().items()}, GATES)
    gates = Gates(len(fused.names))
    gates.load_state_dict(load_file(GATES))
    if args.what == "table":
        rows = table(fused, theirs, gates.eval(), args.seeds)
        rows.round(4).to_csv(HERE/"gates.csv", index=False)
        print(rows.groupby(["split", "method"])[["right_subject", "right_style", "both", "p_both"]].mean().round(3).to_string())
        for split, part in [*rows.groupby("split"), ("all pairs", rows)]:
            by = {method: one.sort_values(["subject", "style", "seed"]) for method, one in part.groupby("method")}
            reference = by.pop(REFERENCE)
            for method, one in by.items(): print(f"{split}: {method} − NP-LoRA, P(both):", evaluate.compare(one.p_both, reference.p_both, one.subject, one["style"]))
        return
    half = world.halves()
    tuning = [[key for key in side.keys if half[key] == "tuning"] for side in theirs]
    rules = {"no LoRA": constant(0, 0, 0), "subject alone": constant(1, 0, 0), "style alone": constant(0, 1, 0), "plain sum": constant(1, 1, 0), "NP-LoRA": NP, "soft EST": soft_est, "fitted gates": gates, "half of the way": halfway(gates, NP), "both, then soft EST": both_then_est}
    for what, sides, names in (("shelf, left out of the fit", ours, left), ("tuning pairs", theirs, tuning)):
        data = truths(fused, sides, *names, 2, 12)
        found = pd.DataFrame({name: error(fused, sides, data, rule) for name, rule in rules.items()}, index=[f"t {level}" for level in LEVELS]).T
        print(what, found.assign(mean=found.mean(axis=1)).round(3).to_string(), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "errors", "table"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=4)
    main(parser.parse_args())
