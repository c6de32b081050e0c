"The merges against things loramix did not write: PEFT's weighted adapters, float64 dense products, closed forms, least squares by brute force."
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from tiny import WIDE, quiet  # noqa: F401 (quiet is a fixture)
from loramix.lora import LowRank, read_lora
from loramix.merges import (MERGES, average_merge, blora_merge, dare_merge, dare_ties_merge, default_blocks, direct_merge, keep_blocks, merge, np_merge, project, prune_merge, record,
    ssr_factor, ssr_merge, svd_merge, ties_merge, zip_merge)

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = os.environ.get("LORAMIX_TEST_DATA")


def pair(pipe, layers=WIDE, ranks=(2, 3), text=False, scales=(1., 1.)):
    "Two LoRAs of a pipeline, as state dicts with alphas and as read."
    states = [tiny.lora_state(pipe, seed, rank, .5, layers, text) for seed, rank in zip((1, 2), ranks)]
    for state, rank, scale in zip(states, ranks, scales):
        for key in [key for key in state if key.endswith("lora_A.weight")]: state[key.replace(".lora_A.weight", ".alpha")] = torch.tensor(scale*rank)
    return states, [dataclasses.replace(read_lora(state), name=name) for state, name in zip(states, ("dog", "ink"))]


def dense(lora, name): return lora.layers[name].dense(torch.float64)


@pytest.mark.parametrize("kind,ours,settings", [("svd", svd_merge, {}), ("ties_svd", ties_merge, dict(density=.4)), ("magnitude_prune_svd", prune_merge, dict(density=.3))])
def test_against_weighted_adapters_of_peft(kind, ours, settings):
    "A PEFT model of our layers with two adapters, merged by PEFT itself into a third."
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(dict(q=torch.nn.Linear(12, 10, bias=False), k=torch.nn.Linear(7, 9, bias=False), c=torch.nn.Conv2d(4, 6, 3, bias=False), p=torch.nn.Conv2d(4, 6, 1, bias=False)))
    model = get_peft_model(net, LoraConfig(r=3, lora_alpha=6, target_modules=["q", "k", "c", "p"], init_lora_weights=False), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=1.5, target_modules=["q", "k", "c", "p"], init_lora_weights=False))
    layers = {adapter: {f"unet.{name}": LowRank(module.lora_A[adapter].weight.data.clone(), module.lora_B[adapter].weight.data.clone(), module.scaling[adapter])
                        for name, module in model.base_model.model.items()} for adapter in "ab"}
    loras = [dataclasses.replace(read_lora({"unet.x.lora_A.weight": torch.ones(1, 2), "unet.x.lora_B.weight": torch.ones(2, 1)}), name=n, layers=l) for n, l in layers.items()]
    model.add_weighted_adapter(["a", "b"], [.7, 1.2], "m", combination_type=kind, svd_rank=3, **settings)
    merged = ours(*loras, strengths=(.7, 1.2), rank=3, **settings)
    for name, module in model.base_model.model.items():
        theirs = module.get_delta_weight("m").detach()
        torch.testing.assert_close(merged.layers[f"unet.{name}"].dense(), theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind,ours", [("dare_linear", dare_merge), ("dare_ties", dare_ties_merge)])
def test_dare_repeats_peft_under_the_layers_own_seed(kind, ours):
    "The draws are PEFT's own, from a seed made of ours and the layer's name; order and the state of the generator have no say."
    import hashlib
    from peft.utils import merge_utils
    _, (c, s) = pair(tiny.sd())
    torch.manual_seed(123)
    state = torch.get_rng_state()
    merged = ours(c, s, density=.4, seed=7, rank="full")
    assert torch.equal(state, torch.get_rng_state())
    for name in c.layers:
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"7 {name}".encode()).digest()[:7], "big"))
        wanted = getattr(merge_utils, kind)([x.layers[name].dense().flatten(1) for x in (c, s)], torch.tensor([1., 1.]), .4)
        torch.testing.assert_close(merged.layers[name].dense().flatten(1), wanted, atol=1e-5, rtol=1e-4)
    turned = ours(dataclasses.replace(c, layers=dict(reversed(c.layers.items()))), s, density=.4, seed=7, rank="full")
    for name in c.layers: assert torch.equal(turned.layers[name].dense(), merged.layers[name].dense())


def test_dare_keeps_the_expectation():
    _, (c, s) = pair(tiny.sd(), layers=("to_q",))
    name = next(iter(c.layers))
    mean = torch.stack([dare_merge(c, s, density=.5, seed=seed, rank="full").layers[name].dense() for seed in range(400)]).mean(0)
    wanted = c.layers[name].dense() + s.layers[name].dense()
    assert (mean - wanted).norm()/wanted.norm() < 3/np.sqrt(400)


def test_direct_average_against_float64():
    "Text encoders and convolutions included; strengths; alpha."
    _, (c, s) = pair(tiny.sd(), text=True, scales=(.5, 3.))
    assert c.layers[next(iter(c.layers))].scale == .5
    both, mean = direct_merge(c, s, strengths=(.3, -.7)), average_merge(c, s)
    assert set(both.layers) == set(c.layers) and any(name.startswith("text_encoder.") for name in both.layers)
    for name in c.layers:
        torch.testing.assert_close(dense(both, name), .3*dense(c, name) - .7*dense(s, name), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(dense(mean, name), (dense(c, name) + dense(s, name))/2, atol=1e-6, rtol=1e-5)
        assert both.layers[name].rank == 5


def test_svd_is_the_best_of_its_rank():
    "Eckart–Young against numpy, the reported error, and no random rank-r matrix does better."
    _, (c, s) = pair(tiny.sd())
    merged = svd_merge(c, s, rank=2)
    lost = whole = 0
    for name in c.layers:
        M = (dense(c, name) + dense(s, name)).flatten(1)
        S = np.linalg.svd(M.numpy(), compute_uv=False)
        assert abs(float((dense(merged, name).flatten(1) - M).square().sum()) - (S[2:]**2).sum()) < 1e-5*(S**2).sum()
        lost, whole = lost + (S[2:]**2).sum(), whole + (S**2).sum()
    assert abs(record(merged)["error"] - np.sqrt(lost/whole)) < 1e-6


@pytest.mark.parametrize("mu", [0., .5, 2., float("inf")])
def test_np_against_qr(mu):
    "The formula of the paper with a QR of A_sᵀ in float64; rank r_c + r_s; several styles."
    _, (c, s) = pair(tiny.sd())
    _, (_, t) = pair(tiny.sd(), ranks=(2, 1))
    t = dataclasses.replace(t, name="oil")
    part = 1. if mu == float("inf") else mu/(1 + mu)
    for styles in ([s], [s, t]):
        merged = np_merge(c, styles, mu=mu)
        for name in c.layers:
            A = torch.cat([x.layers[name].down.flatten(1).double() for x in styles])
            Q = torch.linalg.qr(A.T)[0]
            wanted = sum(dense(x, name).flatten(1) for x in styles) + dense(c, name).flatten(1) @ (torch.eye(A.shape[1]) - part*Q @ Q.T)
            torch.testing.assert_close(dense(merged, name).flatten(1), wanted, atol=2e-6, rtol=1e-4)
            assert merged.layers[name].rank == 2 + sum(x.layers[name].rank for x in styles)


def test_projection_with_dependent_and_untrained_rows():
    "A rank-deficient A_s spans only what it spans; an update that is zero takes nothing away."
    g = torch.Generator().manual_seed(0)
    A = torch.randn(2, 8, generator=g)
    c = LowRank(torch.randn(3, 8, generator=g), torch.randn(5, 3, generator=g))
    make = lambda name, u: dataclasses.replace(read_lora({"unet.x.lora_A.weight": torch.ones(1, 2), "unet.x.lora_B.weight": torch.ones(2, 1)}), name=name, layers={"unet.q": u})
    twice = LowRank(torch.cat([A, A]), torch.randn(5, 4, generator=g))
    out = project(make("c", c), make("s", twice), mu=float("inf")).layers["unet.q"].dense(torch.float64)
    assert (out @ A.double().T).abs().max() < 1e-5
    assert torch.linalg.matrix_rank(out) == 3
    zero = LowRank(A, torch.zeros(5, 2))
    torch.testing.assert_close(project(make("c", c), make("s", zero)).layers["unet.q"].dense(), c.dense())


def test_ssr_against_brute_force():
    "The normal equations against least squares over all entries of B', three LoRAs, small ridge; and the ridge itself as extra rows."
    g = torch.Generator().manual_seed(1)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    ranks, n, out = (2, 1, 3), 9, 5
    parts = [LowRank(new(r, n).float(), new(out, r).float(), scale) for r, scale in zip(ranks, (1., .5, 2.))]
    X = [new(n, 4) @ new(4, 50) for _ in ranks]
    A = torch.cat([u.down.double() for u in parts])
    grams = torch.stack([(A @ x) @ (A @ x).T for x in X])
    make = lambda name, u: dataclasses.replace(read_lora({"unet.x.lora_A.weight": torch.ones(1, 2), "unet.x.lora_B.weight": torch.ones(2, 1)}), name=name, layers={"unet.q": u})
    loras = [make(f"l{k}", u) for k, u in enumerate(parts)]
    for ridge in (1e-10, .1):
        merged = ssr_merge(loras[:2], loras[2], {"unet.q": grams}, strengths=(1., .8, 1.5), ridge=ridge).layers["unet.q"]
        H = torch.cat([A @ x for x in X], 1)
        Y = torch.cat([w*u.dense(torch.float64) @ x for u, x, w in zip(parts, X, (1., .8, 1.5))], 1)
        lam = ridge*grams.sum(0).diagonal().mean()
        rows, answers = torch.cat([H.T, lam.sqrt()*torch.eye(6)]), torch.cat([Y.T, torch.zeros(6, out, dtype=torch.float64)])
        wanted = torch.from_numpy(np.linalg.lstsq(rows.numpy(), answers.numpy(), rcond=None)[0]).T
        torch.testing.assert_close(merged.up.double(), wanted, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(merged.down.double(), A, atol=1e-6, rtol=1e-6)


def test_zip_columns():
    _, (c, s) = pair(tiny.sd())
    g = torch.Generator().manual_seed(3)
    mergers = {name: [torch.rand(u.shape[1], generator=g) for _ in range(2)] for name, u in c.layers.items()}
    merged = zip_merge(c, s, mergers, strengths=(.5, 1.))
    for name in c.layers:
        m_c, m_s = (m.double().view(1, -1, *[1]*(c.layers[name].dense().dim() - 2)) for m in mergers[name])
        torch.testing.assert_close(dense(merged, name), .5*dense(c, name)*m_c + dense(s, name)*m_s, atol=1e-6, rtol=1e-5)


def test_layers_in_one_file_only_keep_that_lora():
    pipe = tiny.sd()
    _, (c, s) = pair(pipe)
    names = list(c.layers)
    c, s = (dataclasses.replace(x, layers={n: u for n, u in x.layers.items() if n != gone}) for x, gone in ((c, names[0]), (s, names[1])))
    for name, function in MERGES.items():
        if name == "blora": continue
        merged = function(c, s, strengths=(.5, 2.))
        half = .5 if name == "average" else 1.
        assert set(merged.layers) == set(names)
        torch.testing.assert_close(dense(merged, names[0]), half*2*dense(s, names[0]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(dense(merged, names[1]), half*.5*dense(c, names[1]), atol=1e-5, rtol=1e-4)


def test_blocks():
    _, (c, s) = pair(tiny.sd())
    merged = blora_merge(c, s, subject_blocks=("down_blocks",), style_blocks=("up_blocks", "mid_block"))
    for name in c.layers:
        if name.startswith("unet.down_blocks."): torch.testing.assert_close(dense(merged, name), dense(c, name), atol=1e-6, rtol=1e-6)
        elif name.startswith(("unet.up_blocks.", "unet.mid_block.")): torch.testing.assert_close(dense(merged, name), dense(s, name), atol=1e-6, rtol=1e-6)
        else: assert name not in merged.layers
    assert default_blocks(["unet.up_blocks.1.x", "unet.up_blocks.2.x", "unet.up_blocks.3.x"]) == (("mid_block", "up_blocks.1"), ("up_blocks.2", "up_blocks.3"))
    assert default_blocks([], "sdxl") == (("up_blocks.0.attentions.0",), ("up_blocks.0.attentions.1",))
    only = keep_blocks(c, "mid_block")
    assert only.name == c.name and all(name.startswith("unet.mid_block.") for name in only.layers)


@pytest.mark.skipif(not DATA, reason="LORAMIX_TEST_DATA is not set: real LoRA files are not there")
def test_every_merge_of_a_real_pair():
    "A golden pair of public SD 1.5 files: every merge is finite, names its parts, and the exact ones agree with float64."
    golden = json.loads((Path(DATA)/"golden/selections.json").read_text())[0]
    c, s = (read_lora(Path(DATA)/"loras"/f"{golden[role]}.safetensors") for role in ("subject", "style"))
    few = list(c.denoiser)[::16]
    c, s = (dataclasses.replace(x, layers={n: x.layers[n] for n in few if n in x.layers}) for x in (c, s))
    for name in MERGES:
        merged = merge(name, c, s)
        assert [part["sha256"] for part in record(merged)["loras"]] == [c.sha256, s.sha256]
        assert merged.family == "sd1" and all(u.up.isfinite().all() and u.down.isfinite().all() for u in merged.layers.values())
    for n in few: torch.testing.assert_close(dense(direct_merge(c, s), n), dense(c, n) + dense(s, n), atol=1e-6, rtol=1e-4)


def test_errors_say_what_to_do():
    _, (c, s) = pair(tiny.sd(), layers=("to_q",))
    for call, words in ((lambda: ties_merge(c, s, density=0), "above 0"), (lambda: svd_merge(c, s, rank=1.5), "whole number"), (lambda: np_merge(c, s, mu=-.1), "at least 0"),
                        (lambda: direct_merge(c, s, strengths=(0, 0)), "strengths 0"), (lambda: merge("sum", c, s), "average"), (lambda: project([c, c], s), "one subject"),
                        (lambda: blora_merge(c, s, subject_blocks=("nowhere",), style_blocks=("nowhere",)), "nothing is left"), (lambda: ssr_factor(torch.zeros(1, 1, 1), [1], 0), "ridge")):
        with pytest.raises(ValueError, match=words): call()
    other = dataclasses.replace(s, family="sdxl")
    with pytest.raises(ValueError, match="same base model"): direct_merge(dataclasses.replace(c, family="sd1"), other)
