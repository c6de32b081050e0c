"The samplers against a plain slow computation: pipelines with LoRAs fused by PEFT, layers replaced by hand, losses differentiated by finite differences."
import copy
import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from torch.nn import functional as F

import tiny
from tiny import BUILD, WIDE, NOISE, denoiser, run, quiet  # noqa: F401 (quiet is a fixture)
from loramix.fusion import fuse
from loramix.lora import read_lora
from loramix.merges import direct_merge, sides
from loramix.samplers import (Zipped, apply_lora, attach, composite, constant_plan, dynamic, moved_dot, moved_kl, overlap, rank_grams, record_calls, ssr_lora, zip_lora, zip_mergers)
from loramix.steps import FusionError
from loramix.weights import find_sites

pytestmark = pytest.mark.filterwarnings("ignore")


def loras(pipe, n=2, layers=WIDE, text=False, size=.2):
    "LoRAs of a pipeline, as state dicts and as read."
    states = [tiny.lora_state(pipe, seed, 2, size, layers, text) for seed in range(1, n + 1)]
    return states, [dataclasses.replace(read_lora(state), name=f"lora{i}") for i, state in enumerate(states)]


def weights(pipe): return {(part, name): value.clone() for part, module in pipe.components.items() if isinstance(module, torch.nn.Module) for name, value in module.state_dict().items()}


def hooks(pipe): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in denoiser(pipe)[1].modules())


class Mean(torch.nn.Module):
    "Several denoisers as one: the mean of what they say. The slow way to LoRA Composite."
    def __init__(self, parts):
        super().__init__()
        self.parts, self.config, self.dtype = torch.nn.ModuleList(parts), parts[0].config, parts[0].dtype
    def __getattr__(self, name):
        try: return super().__getattr__(name)
        except AttributeError: return getattr(self.parts[0], name)
    def forward(self, *args, **kwargs):
        outputs = [part(*args, **kwargs) for part in self.parts]
        return type(outputs[0])([sum(o[0] for o in outputs)/len(outputs)]) if isinstance(outputs[0], tuple) else type(outputs[0])(sum(o[0] for o in outputs)/len(outputs))


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("n", [2, 3])
def test_composite_is_the_mean_of_pipelines_with_one_lora_each(family, n):
    "N copies of the denoiser, each with one LoRA merged in by diffusers and PEFT, averaged at each call; guidance on."
    layers = tiny.ATTENTION if family == "flux" else WIDE
    pipe = BUILD[family]()
    states, read = loras(pipe, n, layers)
    parts = []
    for state in states:
        other = BUILD[family]()
        other.load_lora_weights(dict(state)); other.fuse_lora(); other.unload_lora_weights()
        parts.append(denoiser(other)[1])
    slow = BUILD[family]()
    setattr(slow, denoiser(slow)[0], Mean(parts))
    kept, count = weights(pipe), hooks(pipe)
    with composite(pipe, read[:-1], read[-1]): ours = run(pipe)
    torch.testing.assert_close(ours, run(slow), atol=2e-5, rtol=1e-4)
    assert all(torch.equal(value, kept[key]) for key, value in weights(pipe).items()) and hooks(pipe) == count
    with pytest.raises(AssertionError): torch.testing.assert_close(ours, run(pipe), atol=1e-3, rtol=1e-3)


def test_composite_with_two_calls_a_step():
    "Heun calls the denoiser twice a step; every call is averaged."
    build = lambda: tiny.sd(scheduler=HeunDiscreteScheduler(**NOISE))
    pipe = build()
    states, read = loras(pipe)
    parts = []
    for state in states:
        other = build(); other.load_lora_weights(dict(state)); other.fuse_lora(); other.unload_lora_weights()
        parts.append(other.unet)
    slow = build(); slow.unet = Mean(parts)
    with composite(pipe, *read): ours = run(pipe)
    torch.testing.assert_close(ours, run(slow), atol=2e-5, rtol=1e-4)


def slow_dynamic(pipe, read, measure, chosen):
    "Replace each layer's forward by the definition, with dense float32 ΔW and PyTorch's own divergence."
    for name in dict.fromkeys(n for lora in read for n in lora.denoiser):
        module = pipe.get_submodule(name) if hasattr(pipe, "get_submodule") else getattr(pipe, name.split(".")[0]).get_submodule(name.split(".", 1)[1])
        deltas = [lora.layers[name].dense() for lora in read]
        def forward(x, module=module, deltas=deltas, name=name):
            plain = lambda weight, bias: F.linear(x, weight, bias) if isinstance(module, torch.nn.Linear) else module._conv_forward(x, weight, bias)
            y = plain(module.weight, module.bias)
            outs = [y + plain(d.view(module.weight.shape), None) for d in deltas]
            rows = (lambda t: t.flatten(0, -2)) if isinstance(module, torch.nn.Linear) else (lambda t: t.movedim(1, -1).flatten(0, -2))
            if measure == "kl": scores = [F.kl_div(F.log_softmax(rows(o), 1), F.log_softmax(rows(y), 1), reduction="batchmean", log_target=True).item() for o in outs]
            else: scores = [-torch.einsum("tf,tf->", rows(y), rows(o)).item() for o in outs]
            best = max(range(len(outs)), key=scores.__getitem__)
            chosen.setdefault(name, []).append(best)
            return outs[best]
        module.forward = forward


@pytest.mark.parametrize("measure", ["kl", "dot"])
def test_dynamic_is_the_definition(measure):
    "Layers replaced by hand; the latents and every single choice agree."
    pipe, slow = tiny.sd(), tiny.sd()
    _, read = loras(pipe)
    chosen = {}
    slow_dynamic(slow, read, measure, chosen)
    kept, count = weights(pipe), hooks(pipe)
    with dynamic(pipe, *read, measure=measure) as m: ours, plan = run(pipe), m.plan
    torch.testing.assert_close(ours, run(slow), atol=2e-5, rtol=1e-4)
    for i, name in enumerate(plan.layers): assert plan.choice[:, i].argmax(-1).tolist() == chosen[name], name
    assert len({c for row in chosen.values() for c in row}) == 2
    assert all(torch.equal(value, kept[key]) for key, value in weights(pipe).items()) and hooks(pipe) == count


@pytest.mark.parametrize("family", BUILD)
def test_dynamic_written_down_is_a_plan(family):
    "The choices of a run, fused as a plan, give the same latents; a strength of 0 leaves the other LoRA alone."
    pipe = BUILD[family]()
    _, read = loras(pipe, 3, tiny.ATTENTION if family == "flux" else WIDE, text=True)
    with dynamic(pipe, read[:2], read[2]) as m: ours, plan = run(pipe), m.plan
    with fuse(pipe, plan, read): torch.testing.assert_close(run(pipe), ours, atol=2e-5, rtol=1e-4)
    with dynamic(pipe, read[0], read[1]) as m:
        assert m.plan is None
        for steps in (5, 3): run(pipe, steps=steps); assert m.plan.steps == steps and (m.plan.choice.sum(-1) == 1).all()
    with dynamic(pipe, read[0], read[1], strengths=(0., .7)): only = run(pipe)
    with apply_lora(pipe, read[1], strength=.7): torch.testing.assert_close(run(pipe), only, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1., 5.])
def test_a_picture_does_not_depend_on_its_batch(guidance):
    "Three pictures at once, and each alone: the same, under every sampler."
    pipe = tiny.sd()
    _, read = loras(pipe)
    noise = tiny.latents(pipe, 3, 7)
    for make in (lambda: dynamic(pipe, *read), lambda: dynamic(pipe, *read, measure="kl"), lambda: composite(pipe, *read)):
        with make():
            together = run(pipe, n=3, latents=noise, guidance_scale=guidance)
            for i in range(3): torch.testing.assert_close(run(pipe, latents=noise[i:i+1], guidance_scale=guidance)[0], together[i], atol=2e-5, rtol=1e-4)


def test_measures_against_torch():
    g = torch.Generator().manual_seed(0)
    y, z = torch.randn(3, 5, 7, generator=g), torch.randn(3, 5, 7, generator=g)
    wanted = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=y), torch.distributions.Categorical(logits=z)).mean(1)
    torch.testing.assert_close(moved_kl(y, z), wanted)
    torch.testing.assert_close(moved_dot(y, z), -torch.stack([torch.stack([a @ b for a, b in zip(*rows)]).mean() for rows in zip(y, z)]))
    torch.testing.assert_close(moved_kl(y[:, 0], z[:, 0]), moved_kl(y[:, :1], z[:, :1]))
    torch.testing.assert_close(moved_dot(y[:, 0], z[:, 0]), moved_dot(y[:, :1], z[:, :1]))


def test_merged_lora_against_peft():
    "A direct merge at work, in both halves, against two PEFT adapters; in the conditional half alone against two pipelines by hand."
    pipe, other = tiny.sd(), tiny.sd()
    states, read = loras(pipe)
    tiny.load(other, dog=states[0], ink=states[1])
    other.set_adapters(["dog", "ink"], [.6, .9])
    with attach(pipe, "direct", *read, strengths=(.6, .9)): torch.testing.assert_close(run(pipe), run(other), atol=2e-5, rtol=1e-4)
    merged = direct_merge(*read, strengths=(.6, .9))
    with apply_lora(pipe, merged, conditional_only=True): ours = run(pipe)
    plain = tiny.sd()
    class Halves(torch.nn.Module):
        "The bare UNet for the first half of a batch, the adapted one for the second."
        config, dtype = plain.unet.config, torch.float32
        def __getattr__(self, name): return getattr(plain.unet, name)
        def forward(self, x, t, encoder_hidden_states=None, **kwargs):
            a, b = (unet(x[half], t, encoder_hidden_states=encoder_hidden_states[half], return_dict=False)[0] for unet, half in ((plain.unet, [0]), (other.unet, [1])))
            return (torch.cat([a, b]),)
    slow = tiny.sd(); slow.unet = Halves()
    torch.testing.assert_close(ours, run(slow), atol=2e-5, rtol=1e-4)


def test_grams_of_a_convolution_against_unfolding():
    "Rank-space activations of convolutions and linear layers, collected over a run, against dense patches of recorded inputs."
    pipe = tiny.sd()
    _, read = loras(pipe)
    grams = rank_grams(pipe, *read, "a dog", seed=3, num_inference_steps=2, height=16, width=16)
    sites = find_sites(pipe, read, list(grams))
    inputs, handles = {}, []
    for site in sites: handles.append(site.path[-1].register_forward_hook(lambda module, args, output, name=site.name: inputs.setdefault(name, []).append((module, args[0].clone()))))
    with apply_lora(pipe, read[1]): pipe("a dog", generator=torch.Generator().manual_seed(3), num_inference_steps=2, height=16, width=16, output_type="latent")
    for handle in handles: handle.remove()
    kinds = set()
    for name, seen in inputs.items():
        A = torch.cat([lora.layers[name].down.flatten(1) for lora in read]).double()
        module = seen[0][0]
        kinds.add(type(module).__name__ + str(tuple(module.weight.shape[2:])))
        if isinstance(module, torch.nn.Linear): X = torch.cat([x.flatten(0, -2) for _, x in seen]).double().T
        else: X = torch.cat([F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).movedim(1, -1).flatten(0, 1) for _, x in seen]).double().T
        torch.testing.assert_close(grams[name][1], (A @ X) @ (A @ X).T, atol=1e-3, rtol=1e-4)
    assert {"Linear()", "Conv2d(3, 3)", "Conv2d(1, 1)"} <= kinds


def test_ssr_lora_repeats_each_lora_on_its_own_run_better_than_the_sum():
    "On the calibration inputs of each layer the merged LoRA is nearer to each LoRA's own answer than the plain sum, in every layer."
    pipe = tiny.sd()
    _, read = loras(pipe, layers=tiny.ATTENTION)
    merged, summed = ssr_lora(pipe, *read, prompts=["a dog", "in ink"], num_inference_steps=2, height=16, width=16), direct_merge(*read)
    for name in summed.layers: assert (merged.layers[name].down == summed.layers[name].down).all()
    miss = dict(merged=0., summed=0.)
    for k, prompt in enumerate(("a dog", "in ink")):
        inputs = {}
        sites = find_sites(pipe, read, list(summed.layers))
        handles = [site.path[-1].register_forward_hook(lambda module, args, output, name=site.name: inputs.setdefault(name, []).append(args[0].flatten(0, -2))) for site in sites]
        with apply_lora(pipe, read[k]): pipe(prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=2, height=16, width=16, output_type="latent")
        for handle in handles: handle.remove()
        for name, xs in inputs.items():
            X = torch.cat(xs).T
            for which, lora in (("merged", merged), ("summed", summed)): miss[which] += float((lora.layers[name].dense() @ X - read[k].layers[name].dense() @ X).square().sum())
    assert miss["merged"] < .6*miss["summed"]


def test_zip_gradient_against_finite_differences():
    "The loss through the whole denoiser, differentiated by hand at a few columns."
    pipe = tiny.sd(dtype=torch.float64)
    _, read = loras(pipe, layers=("to_q", "conv1"), size=.3)
    of = sides(*read)
    with apply_lora(pipe, read[0]): calls = record_calls(pipe, "a dog", 0, num_inference_steps=2, height=16, width=16)
    assert len(calls) == 2 and calls[0][2].shape[0] == 1                                # the half with the prompt
    sites = find_sites(pipe, read, list(read[0].layers))
    mergers = {site.name: [torch.rand(u.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_() for u in site.updates] for site in sites}
    def loss():
        args, kwargs, wanted = calls[1]
        with Zipped(sites, of.strengths, mergers): return (pipe.unet(*args, **kwargs)[0] - wanted).square().mean() + .3*overlap(mergers)
    leaves = [m for parts in mergers.values() for m in parts]
    gradients = torch.autograd.grad(loss(), leaves)
    for leaf, gradient in zip(leaves[:6], gradients):
        column = int(gradient.abs().argmax())
        with torch.no_grad():
            leaf[column] += 1e-5; up = loss(); leaf[column] -= 2e-5; down = loss(); leaf[column] += 1e-5
        assert abs(float((up - down)/2e-5 - gradient[column])) < 1e-5*max(1., float(gradient.abs().max()))


def test_zip_learns_and_leaves_the_pipeline_alone():
    pipe = tiny.sd()
    _, read = loras(pipe, layers=tiny.ATTENTION, size=.5)
    kept, count = weights(pipe), hooks(pipe)
    settings = dict(prompts="a dog in ink", num_inference_steps=3, height=16, width=16)
    mergers, course = zip_mergers(pipe, *read, iterations=40, rate=.05, **settings)
    assert sum(e for e, _ in course[-8:]) < .7*sum(e for e, _ in course[:8])
    again, _ = zip_mergers(pipe, *read, iterations=40, rate=.05, **settings)
    assert all(torch.equal(a, b) for name in mergers for a, b in zip(mergers[name], again[name]))
    assert all(torch.equal(value, kept[key]) for key, value in weights(pipe).items()) and hooks(pipe) == count and all(p.grad is None for p in pipe.unet.parameters())
    pressed, _ = zip_mergers(pipe, *read, iterations=40, rate=.05, penalty=10., **settings)
    assert overlap(pressed) < .5*overlap(mergers)
    merged = zip_lora(pipe, *read, iterations=0, **settings)
    for name, update in merged.layers.items(): torch.testing.assert_close(update.dense(), direct_merge(*read).layers[name].dense(), atol=1e-6, rtol=1e-5)


def test_one_at_a_time_and_errors():
    pipe = tiny.sd()
    _, read = loras(pipe)
    kept = weights(pipe)
    with composite(pipe, *read):
        for call in (lambda: dynamic(pipe, *read), lambda: attach(pipe, "np", *read), lambda: ssr_lora(pipe, *read, prompts="x", num_inference_steps=1), lambda: copy.deepcopy(pipe.unet)):
            with pytest.raises(FusionError): call()
    for call, words in ((lambda: attach(pipe, "klora", *read), "loramix.mix"), (lambda: dynamic(pipe, *read, measure="l2"), "kl, dot"), (lambda: attach(pipe, "dynamic", *read, conditional_only=True), "both halves"),
                        (lambda: rank_grams(pipe, *read, ["one"]), "each of the 2")):
        with pytest.raises(ValueError, match=words): call()
    assert all(torch.equal(value, kept[key]) for key, value in weights(pipe).items())
    m = attach(pipe, "ties", *read)
    m.remove(), m.remove()
    with pytest.raises(RuntimeError, match="removed"): m("a dog")
    assert constant_plan(sides(*read), 3).weights.sum() > 0
    assert isinstance(pipe.scheduler, DDIMScheduler)


def test_the_same_method_as_a_plan_and_as_a_merge():
    "B-LoRA's filter, NP-LoRA and the direct sum, each once as a plan and once as one LoRA: the same latents."
    from loramix.merges import blora_merge, np_merge, project
    from loramix.rules import blora, direct
    from loramix.scores import score
    pipe = tiny.sd()
    _, (c, s) = loras(pipe)
    blocks = dict(subject_blocks=("down_blocks", "mid_block"), style_blocks=("up_blocks",))
    for plan, parts, merged in ((direct(score(c, s), 4, strengths=(.5, 1.)), (c, s), direct_merge(c, s, strengths=(.5, 1.))), (blora(score(c, s), 4, **blocks), (c, s), blora_merge(c, s, **blocks)),
                                (direct(score(project(c, s), s), 4), (project(c, s), s), np_merge(c, s))):
        with fuse(pipe, plan, parts): ours = run(pipe)
        with apply_lora(pipe, merged): torch.testing.assert_close(run(pipe), ours, atol=2e-5, rtol=1e-4)


def test_rules_in_the_conditional_half_alone():
    "Every rule's option against a run whose two halves are computed by two fusions by hand."
    from loramix.rules import RULES
    from loramix.scores import score
    pipe, bare = tiny.sd(), tiny.sd()
    _, (c, s) = loras(pipe, layers=("to_q", "to_v"))
    for name, rule in RULES.items():
        extra = dict(subject_blocks=("down_blocks",), style_blocks=("up_blocks",)) if name == "blora" else {}
        once = {} if name == "acfg" else dict(conditional_only=True)
        plan = rule(score(c, s), 4, **extra, **once)
        both = dataclasses.replace(plan, unconditional_choice=None)
        with fuse(pipe, plan, (c, s)): ours = run(pipe)
        class Halves(torch.nn.Module):
            "The bare UNet for the first half, the fused one for the second."
            config, dtype = bare.unet.config, torch.float32
            def __getattr__(self, key): return getattr(bare.unet, key)
            def forward(self, x, t, encoder_hidden_states=None, **kwargs):
                return (torch.cat([unet(x[half], t, encoder_hidden_states=encoder_hidden_states[half], return_dict=False)[0] for unet, half in ((bare.unet, [0]), (pipe.unet, [1]))]),)
        slow = tiny.sd(scheduler=pipe.scheduler)
        slow.unet = Halves()
        with fuse(pipe, both, (c, s)): wanted = run(slow)
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4, msg=name)
