"The fusion against things written by others: PEFT's adapters, diffusers' schedulers and pipelines, torch's own weights."
import copy, dataclasses, threading

import pytest, torch
from diffusers import (AutoencoderKL, ControlNetModel, DDIMScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxImg2ImgPipeline, HeunDiscreteScheduler, KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler, LCMScheduler,
    LMSDiscreteScheduler, PNDMScheduler, StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline, UniPCMultistepScheduler)

import tiny
from tiny import BUILD, WIDE, NOISE, denoiser, lora_state, run, quiet  # noqa: F401 (quiet is a fixture)
from loramix.fusion import Fusion, FusionError, fuse
from loramix.lora import LowRank, read_lora
from loramix.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore")


def pair(pipe, *, text=False, layers=tiny.ATTENTION, dtype=torch.float32, ranks=(2, 2), size=0.2):
    "Two LoRAs for a pipeline, as state dicts and as read."
    states = {name: lora_state(pipe, seed, rank, size, layers, text, dtype) for name, seed, rank in zip(("dog", "ink"), (1, 2), ranks)}
    return states, [dataclasses.replace(read_lora(state), name=name) for name, state in states.items()]


def plan_of(loras, choice, **kwargs):
    "A plan from [steps, loras] or [steps, layers, loras]."
    layers = tuple(dict.fromkeys(name for lora in loras for name in lora.denoiser))
    choice = torch.as_tensor(choice, dtype=torch.float32)
    if choice.dim() == 2: choice = choice[:, None].expand(-1, len(layers), -1)
    return make_plan(choice, layers, [lora.name for lora in loras], ("subject", "style")[:len(loras)], {"name": "test"}, **kwargs)


def switch(loras, steps=4, at=0.5):
    "The first LoRA, then the second."
    return plan_of(loras, [[1., 0.] if i < at*steps else [0., 1.] for i in range(steps)])


def soft(loras, steps=4):
    "Both at once, other factors at each step and layer."
    layers = dict.fromkeys(name for lora in loras for name in lora.denoiser)
    return plan_of(loras, torch.rand(steps, len(layers), 2, generator=torch.Generator().manual_seed(5)))


def weights(pipe):
    "A copy of every tensor in every part of a pipeline."
    return {(part, name): value.clone() for part, module in pipe.components.items() if isinstance(module, torch.nn.Module) for name, value in module.state_dict().items()}


def same(pipe, before):
    "Whether every tensor is as it was, to the bit."
    now = weights(pipe)
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


def far(a, b): return ((a - b).abs().max()/b.abs().max()).item()


def peft(build, states, weights, **kwargs):
    "A pipeline with PEFT's adapters at these weights."
    pipe = build(**kwargs)
    tiny.load(pipe, **states)
    pipe.set_adapters(list(states), weights)
    return pipe


def callback_switch(pipe, rows):
    "A user's callback that gives PEFT's adapters the row of the *next* step (it is called after a step)."
    def callback(pipe, step, t, kwargs):
        if step + 1 < len(rows): pipe.set_adapters(["dog", "ink"], rows[step + 1])
        return kwargs
    pipe.set_adapters(["dog", "ink"], rows[0])
    return callback


# ---- the weights are right

@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("factors", [[1., 0.], [0., 1.], [.7, .4], [1.3, -.5]])
def test_a_constant_plan_is_pefts_set_adapters(name, factors):
    pipe = BUILD[name]()
    states, loras = pair(pipe, ranks=(2, 3))
    base = run(pipe)
    with fuse(pipe, plan_of(loras, [factors]*4), loras): mixed = run(pipe)
    want = run(peft(BUILD[name], states, factors))
    assert far(mixed, want) <= 1e-4 and far(base, want) > 1e-2
    assert torch.equal(run(pipe), base)


@pytest.mark.parametrize("name", BUILD)
def test_every_step_has_its_row(name):
    "Against a callback that switches PEFT's adapters, at another pair of factors for each step."
    rows = [[1., 0.], [.6, .3], [.6, .3], [0., 1.], [0., 0.]]
    pipe = BUILD[name]()
    states, loras = pair(pipe)
    with fuse(pipe, plan_of(loras, rows), loras) as fusion:
        mixed = run(pipe, steps=5)
        assert fusion.step == 4 and fusion.changes == 4*len(loras[0].denoiser)
    judge = peft(BUILD[name], states, rows[0])
    want = run(judge, steps=5, callback_on_step_end=callback_switch(judge, rows))
    assert far(mixed, want) <= 1e-4
    late = run(judge, steps=5, callback_on_step_end=callback_switch(judge, [rows[0], *rows[:-1]]))
    assert far(late, want) > 1e-3, "one step late must show, or this test sees nothing"


@pytest.mark.parametrize("name", BUILD)
def test_convolutions_and_feed_forward_layers(name):
    pipe = BUILD[name]()
    states, loras = pair(pipe, layers=WIDE, ranks=(3, 2))
    assert name == "flux" or any(len(update.shape) == 4 and update.shape[-1] == 3 for update in loras[0].denoiser.values())
    with fuse(pipe, plan_of(loras, [[.7, .4]]*4), loras): mixed = run(pipe)
    assert far(mixed, run(peft(BUILD[name], states, [.7, .4]))) <= 1e-4


def test_layers_differ_within_a_step():
    "One weight per layer: against weights set by hand."
    pipe, judge = tiny.sd(), tiny.sd()
    _, loras = pair(pipe)
    plan = soft(loras, 1)
    with fuse(pipe, plan, loras): mixed = run(pipe, steps=1)
    for name, row in zip(plan.layers, plan.weights[0]):
        module = judge.unet.get_submodule(name.removeprefix("unet."))
        module.weight.data += sum(factor.item()*lora.layers[name].dense() for factor, lora in zip(row, loras))
    assert far(mixed, run(judge, steps=1)) <= 1e-5


def test_a_layer_in_one_lora_only():
    pipe = tiny.sd()
    states, loras = pair(pipe)
    loras[1] = dataclasses.replace(loras[1], layers=dict(list(loras[1].layers.items())[::2]))
    states["ink"] = {key: value for key, value in states["ink"].items() if key.rsplit(".lora_", 1)[0] in loras[1].layers}
    with fuse(pipe, plan_of(loras, [[.7, .4]]*4), loras): mixed = run(pipe)
    assert far(mixed, run(peft(tiny.sd, states, [.7, .4]))) <= 1e-4


def test_strengths_and_scale_count():
    pipe = tiny.sd()
    states, loras = pair(pipe)
    doubled = dataclasses.replace(loras[0], layers={name: dataclasses.replace(u, scale=2*u.scale) for name, u in loras[0].layers.items()})
    plan = plan_of(loras, [[1., 1.]]*4, strengths=(.3, .5))
    with fuse(pipe, plan, [doubled, loras[1]]): mixed = run(pipe)
    assert far(mixed, run(peft(tiny.sd, states, [.6, .5]))) <= 1e-4


@pytest.mark.parametrize("order", ([0, 1], [1, 0]))
def test_files_of_two_precisions_act_together(order):
    "A float32 and a float16 file in one layer, either first: the sum of both in the weight's own precision."
    pipe = tiny.sd()
    loras = [dataclasses.replace(pair(pipe, dtype=dtype)[1][k], name=name) for k, dtype, name in ((0, torch.float32, "dog"), (1, torch.float16, "ink"))]
    loras, own = [loras[k] for k in order], weights(pipe)
    name = next(iter(loras[0].denoiser))
    with fuse(pipe, plan_of(loras, [[1., .5]]), loras):
        run(pipe, steps=1)
        got = pipe.unet.get_submodule(name.partition(".")[2]).weight
        want = own["unet", name.partition(".")[2] + ".weight"] + loras[0].layers[name].dense() + .5*loras[1].layers[name].dense()
        torch.testing.assert_close(got, want.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    "In bfloat16 the factors of every LoRA but the strongest are rounded too, which the sum may feel by half a unit of their product."
    pipe = tiny.sdxl(dtype=dtype)
    _, loras = pair(pipe, dtype=dtype)
    plan = soft(loras)
    own = {name: pipe.unet.get_submodule(name.removeprefix("unet.")).weight.clone() for name in plan.layers}
    seen = []
    def look(p, step, t, kwargs): seen.append({name: p.unet.get_submodule(name.removeprefix("unet.")).weight.clone() for name in plan.layers}); return kwargs
    with fuse(pipe, plan, loras): run(pipe, callback_on_step_end=look)
    for row, now in zip(plan.weights, seen):
        for name, factors in zip(plan.layers, row):
            exact = own[name].double() + sum(f.double()*lora.layers[name].dense(torch.float64) for f, lora in zip(factors, loras))
            gap, unit, few = (now[name].double() - exact).abs(), 0.5001*torch.finfo(dtype).eps, loras[factors.abs().argmin()].layers[name]
            rounded = float(factors.abs().min())*few.scale*(few.up.double().abs() @ few.down.double().abs()) if dtype == torch.bfloat16 else 0
            assert (gap <= unit*(exact.abs() + rounded) + 1e-6).all()       # half a unit in the last place: one rounding
            assert gap.norm() <= 1.1*(exact.to(dtype).double() - exact).norm()


def test_float64_base():
    pipe = tiny.sd(dtype=torch.float64)
    _, loras = pair(pipe)
    plan = plan_of(loras, [[.7, .4]])
    with fuse(pipe, plan, loras):
        run(pipe, steps=1)
        name = plan.layers[0]
        now = pipe.unet.get_submodule(name.removeprefix("unet.")).weight.clone()
    own = pipe.unet.get_submodule(name.removeprefix("unet.")).weight
    exact = own + sum(f*lora.layers[name].dense(torch.float64) for f, lora in zip((.7, .4), loras))
    assert (now - exact).abs().max() < 1e-7


# ---- and go back

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backup", ["device", "cpu"])
def test_every_weight_comes_back_to_the_bit(dtype, backup):
    pipe = tiny.sdxl(dtype=dtype)
    states, loras = pair(pipe, text=True, layers=WIDE)
    before, addresses = weights(pipe), {name: p.data_ptr() for name, p in pipe.unet.named_parameters()}
    for plan in (switch(loras), soft(loras)):
        fusion = fuse(pipe, plan, loras, backup=backup)
        run(pipe)
        assert not same(pipe, before)
        fusion.remove(); fusion.remove()
        assert same(pipe, before)
    assert addresses == {name: p.data_ptr() for name, p in pipe.unet.named_parameters()}, "edited in place"
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_hooks and "_loramix_fusion" not in pipe.unet.__dict__


def test_a_hundred_mixes_later():
    pipe = tiny.sd(dtype=torch.float16)
    _, loras = pair(pipe, dtype=torch.float16)
    before = weights(pipe)
    for i in range(100):
        with fuse(pipe, soft(loras, 2), loras) as fusion:
            pipe.scheduler.set_timesteps(2)
            for t in pipe.scheduler.timesteps: fusion.go_to(t); fusion.show(fusion.step)
    assert same(pipe, before)


def test_an_exception_in_the_users_callback():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    before, base = weights(pipe), run(pipe)
    def broken(p, step, t, kwargs):
        if step == 1: raise KeyError("mine")
        return kwargs
    with pytest.raises(KeyError, match="mine"):
        with fuse(pipe, switch(loras), loras): run(pipe, callback_on_step_end=broken)
    assert same(pipe, before) and torch.equal(run(pipe), base)
    with fuse(pipe, switch(loras), loras) as fusion:
        mixed = run(pipe)
        with pytest.raises(KeyError): run(pipe, callback_on_step_end=broken)
        assert torch.equal(run(pipe), mixed), "a run broken off leaves no trace in the next"
    assert same(pipe, before)


def test_an_exception_inside_the_denoiser():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    before = weights(pipe)
    with fuse(pipe, switch(loras), loras) as fusion:
        mixed = run(pipe)
        with pytest.raises(Exception): run(pipe, cross_attention_kwargs={"nonsense": 1}, latents=torch.randn(1, 3, 8, 8))
        for error in (KeyboardInterrupt, RuntimeError):
            def burst(*args): raise error
            handle = pipe.unet.mid_block.register_forward_hook(burst)
            with pytest.raises(error): run(pipe)
            handle.remove()
        assert torch.equal(run(pipe), mixed)
    assert same(pipe, before)


def test_a_write_that_fails_midway(monkeypatch):
    "Memory runs out in the middle of a row: the next run is right, and so is the undo."
    import loramix.weights as room
    pipe = tiny.sd()
    _, loras = pair(pipe)
    before = weights(pipe)
    with fuse(pipe, switch(loras), loras) as fusion:
        mixed = run(pipe)
        real, left = room.write_site, [5]
        def scarce(*args):
            left[0] -= 1
            if left[0] < 0: raise MemoryError
            real(*args)
        monkeypatch.setattr(room, "write_site", scarce)
        with pytest.raises(MemoryError): run(pipe)
        monkeypatch.setattr(room, "write_site", real)
        assert torch.equal(run(pipe), mixed)
    assert same(pipe, before)


# ---- from run to run

def test_nothing_carries_over_from_run_to_run():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    def planner(steps): return soft(loras, steps)
    with fuse(pipe, planner, loras) as fusion:
        first = run(pipe, steps=5)
        assert torch.equal(run(pipe, steps=5), first)
        run(pipe, "another prompt altogether", steps=5); assert torch.equal(run(pipe, steps=5), first)
        run(pipe, steps=3); assert torch.equal(run(pipe, steps=5), first)
        def stop(p, step, t, kwargs): p._interrupt = step == 1; return kwargs
        run(pipe, steps=5, callback_on_step_end=stop)
        assert torch.equal(run(pipe, steps=5), first)
        pipe.scheduler = EulerDiscreteScheduler(**NOISE); run(pipe, steps=5)
        pipe.scheduler = DDIMScheduler.from_config(tiny.sd().scheduler.config); assert torch.equal(run(pipe, steps=5), first)
    with fuse(pipe, planner, loras): assert torch.equal(run(pipe, steps=5), first)


@pytest.mark.parametrize("make", [switch, soft])
def test_two_pipelines_alternating(make):
    one, two = tiny.sd(), tiny.sd(seed=7)
    _, loras = pair(one)
    plan = make(loras, 3)
    with fuse(one, plan, loras): alone = run(one, steps=3)
    with fuse(one, plan, loras), fuse(two, plan, loras):
        a = run(one, steps=3); run(two, steps=3)
        between = []
        def callback(p, step, t, kwargs): between.append(run(two, steps=3)); return kwargs
        b = run(one, steps=3, callback_on_step_end=callback)
        assert torch.equal(a, alone) and torch.equal(b, alone) and torch.equal(between[0], between[2])


def test_img2img_on_the_same_denoiser_in_between():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with fuse(pipe, lambda n: soft(loras, n), loras):
        first = run(pipe, steps=5)
        a = run(other, steps=10, image=torch.rand(1, 3, 16, 16), strength=0.3)
        assert torch.equal(run(pipe, steps=5), first)


@pytest.mark.parametrize("steps", [1, 4, 20, 30, 50])
def test_step_counts(steps):
    pipe = tiny.sd()
    _, loras = pair(pipe)
    with fuse(pipe, lambda n: switch(loras, n), loras) as fusion:
        seen = record(fusion)
        run(pipe, steps=steps)
        assert seen == list(range(steps)) and fusion.plan.steps == steps
        assert fusion.changes == len(loras[0].denoiser)*(1 if steps == 1 else 2)


# ---- schedulers

def record(fusion):
    "The step of each denoiser call, as the fusion says."
    seen = []
    def look(module, args, kwargs): seen.append(fusion.step)
    fusion.denoiser.register_forward_pre_hook(look, with_kwargs=True)
    return seen


V = dict(NOISE)
SCHEDULERS = dict(
    ddim=lambda: DDIMScheduler(**V), ddim_trailing=lambda: DDIMScheduler(**V, timestep_spacing="trailing"), euler=lambda: EulerDiscreteScheduler(**V), euler_karras=lambda: EulerDiscreteScheduler(**V, use_karras_sigmas=True),
    euler_a=lambda: EulerAncestralDiscreteScheduler(**V), dpm=lambda: DPMSolverMultistepScheduler(**V), dpm_karras=lambda: DPMSolverMultistepScheduler(**V, use_karras_sigmas=True),
    dpm_lu=lambda: DPMSolverMultistepScheduler(**V, use_lu_lambdas=True), dpm_exponential=lambda: DPMSolverMultistepScheduler(**V, use_exponential_sigmas=True), dpm_sde=lambda: DPMSolverMultistepScheduler(**V, algorithm_type="sde-dpmsolver++"),
    dpm_single=lambda: DPMSolverSinglestepScheduler(**V_NO_OFFSET), unipc=lambda: UniPCMultistepScheduler(**V), unipc_karras=lambda: UniPCMultistepScheduler(**V, use_karras_sigmas=True), lms=lambda: pytest.importorskip("scipy") and LMSDiscreteScheduler(**V),
    lcm=lambda: LCMScheduler(**V_NO_OFFSET), heun=lambda: HeunDiscreteScheduler(**V), heun_karras=lambda: HeunDiscreteScheduler(**V, use_karras_sigmas=True), kdpm2=lambda: KDPM2DiscreteScheduler(**V),
    kdpm2_karras=lambda: KDPM2DiscreteScheduler(**V, use_karras_sigmas=True), kdpm2_a=lambda: KDPM2AncestralDiscreteScheduler(**V), pndm=lambda: PNDMScheduler(**V, skip_prk_steps=True), pndm_rk=lambda: PNDMScheduler(**V, skip_prk_steps=False))
V_NO_OFFSET = {key: value for key, value in NOISE.items() if key != "steps_offset"}
TWICE = ("heun", "heun_karras", "kdpm2", "kdpm2_karras", "kdpm2_a")


def calls(name, steps):
    "The step of each denoiser call of a run, from what is known of each scheduler."
    if name in TWICE: return [i for i in range(steps) for _ in range(2)][:-1]
    if name == "pndm": return [0, 0, *range(1, steps)]
    if name == "pndm_rk": return [0]*4 + [1]*4 + [2]*4 + list(range(3, steps))
    return list(range(steps))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_call_of_each_scheduler_has_its_row(name):
    pipe = tiny.sd(scheduler=SCHEDULERS[name]())
    _, loras = pair(pipe)
    for steps in (50, 7):
        factors = torch.linspace(0, 1, steps)
        plan = plan_of(loras, torch.stack([factors, 1 - factors], 1))
        layer = pipe.unet.get_submodule(plan.layers[0].removeprefix("unet."))
        own, ΔW = layer.weight.clone(), loras[0].layers[plan.layers[0]].dense() - loras[1].layers[plan.layers[0]].dense()
        with fuse(pipe, plan, loras) as fusion:
            seen = []
            def look(module, args, kwargs):
                "The factor that stands in a layer, by least squares."
                now = layer.weight - own - loras[1].layers[plan.layers[0]].dense()
                seen.append(round(((now*ΔW).sum()/(ΔW*ΔW).sum()).item()*(steps - 1)))
            handle = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
            run(pipe, steps=steps)
            handle.remove()
            assert seen == calls(name, steps)


@pytest.mark.parametrize("name", ["dpm_lu", "dpm_karras", "heun", "kdpm2", "unipc_karras", "lms"])
def test_timesteps_given_by_value(name):
    "A loop by hand that copies its timesteps: entries are told apart by the scheduler's own counter."
    pipe = tiny.sd(scheduler=SCHEDULERS[name]())
    _, loras = pair(pipe)
    with fuse(pipe, lambda n: soft(loras, n), loras) as fusion, torch.no_grad():
        pipe.scheduler.set_timesteps(50)
        seen, x, text = record(fusion), torch.randn(1, 4, 8, 8), torch.randn(1, 16, 16)
        for t in pipe.scheduler.timesteps:
            noise = pipe.unet(pipe.scheduler.scale_model_input(x, t), t.clone(), text).sample
            x = pipe.scheduler.step(noise, t, x).prev_sample
        assert seen == calls(name, 50)


@pytest.mark.parametrize("make", [lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), lambda: FlowMatchEulerDiscreteScheduler(shift=3.), lambda: FlowMatchHeunDiscreteScheduler(shift=3.),
    lambda: FlowMatchEulerDiscreteScheduler(shift=3., use_karras_sigmas=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_steps_are_found_through_rounding(make, dtype):
    "FLUX passes t/1000 in the latents' dtype, where the steps of a long schedule are no longer distinct."
    pipe = tiny.flux(scheduler=make(), dtype=dtype)
    _, loras = pair(pipe)
    with fuse(pipe, lambda n: switch(loras, n), loras) as fusion:
        seen = record(fusion)
        if pipe.scheduler.order == 1: run(pipe, steps=60)
        else:
            pipe.scheduler.set_timesteps(20)
            pipe.scheduler.set_begin_index(0)
            for t in pipe.scheduler.timesteps:
                fusion.before(None, (), {"timestep": t.expand(1).to(dtype)/1000}); fusion.after(None, (), None); seen.append(fusion.step)
                pipe.scheduler.step(torch.zeros(1), t, torch.zeros(1))
        assert seen == (list(range(60)) if pipe.scheduler.order == 1 else calls("heun", 20))


def test_true_guidance_calls_twice_a_step():
    pipe = tiny.flux()
    states, loras = pair(pipe)
    rows = [[1., 0.], [.5, .5], [0., 1.]]
    keep = dict(negative_prompt="a cat", true_cfg_scale=2.)
    with fuse(pipe, plan_of(loras, rows), loras) as fusion:
        seen = record(fusion)
        mixed = run(pipe, steps=3, **keep)
        assert seen == [0, 0, 1, 1, 2, 2]
    judge = peft(tiny.flux, states, rows[0])
    assert far(mixed, run(judge, steps=3, callback_on_step_end=callback_switch(judge, rows), **keep)) <= 1e-4


def test_custom_timesteps_and_sigmas():
    pipe = tiny.sd(scheduler=EulerDiscreteScheduler(**NOISE))
    _, loras = pair(pipe)
    with fuse(pipe, lambda n: switch(loras, n), loras) as fusion:
        seen = record(fusion)
        run(pipe, timesteps=[900, 700, 400, 100, 10]); assert seen == [0, 1, 2, 3, 4]
        run(pipe, sigmas=[10., 5., 1., 0.]); assert seen[5:] == [0, 1, 2]


# ---- other pipelines

@pytest.mark.parametrize("strength,first", [(0.3, 7), (0.6, 4), (1.0, 0)])
@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_karras", "pndm"])
def test_image_to_image_starts_at_its_own_row(strength, first, name):
    pipe = tiny.sd(kind=StableDiffusionImg2ImgPipeline, scheduler=SCHEDULERS[name]())
    _, loras = pair(pipe)
    with fuse(pipe, switch(loras, 10), loras) as fusion:
        seen = record(fusion)
        run(pipe, steps=10, image=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), strength=strength)
        assert seen[0] == max(first - (name == "pndm"), 0) and seen[-1] == 9 and seen == sorted(seen)
        assert set(seen) == set(range(seen[0], 10))


@pytest.mark.parametrize("kind", [StableDiffusionXLImg2ImgPipeline, FluxImg2ImgPipeline])
def test_image_to_image_of_other_families(kind):
    pipe = (tiny.sdxl if kind is StableDiffusionXLImg2ImgPipeline else tiny.flux)(kind=kind)
    states, loras = pair(pipe)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    extra = {} if kind is StableDiffusionXLImg2ImgPipeline else dict(height=16, width=16)
    with fuse(pipe, switch(loras, 10), loras) as fusion:
        seen = record(fusion)
        run(pipe, steps=10, image=image, strength=0.6, **extra)
        assert seen == [4, 5, 6, 7, 8, 9]


def test_denoising_end_and_start():
    pipe = tiny.sdxl()
    _, loras = pair(pipe)
    with fuse(pipe, switch(loras, 10), loras) as fusion:
        seen = record(fusion)
        run(pipe, steps=10, denoising_end=0.7)
        assert seen == [0, 1, 2, 3, 4, 5, 6]


def test_inpainting():
    pipe = tiny.sd(kind=StableDiffusionInpaintPipeline)
    states, loras = pair(pipe)
    draw = torch.Generator().manual_seed(0)
    keep = dict(image=torch.rand(1, 3, 16, 16, generator=draw), mask_image=(torch.rand(1, 1, 16, 16, generator=draw) > .5).float(), height=16, width=16)
    with fuse(pipe, plan_of(loras, [[.7, .4]]*4), loras): mixed = run(pipe, **keep)
    assert far(mixed, run(peft(tiny.sd, states, [.7, .4], kind=StableDiffusionInpaintPipeline), **keep)) <= 1e-4


def test_controlnet():
    def build():
        base = tiny.sd()
        parts = {key: value for key, value in base.components.items() if key != "image_encoder"}
        pipe = StableDiffusionControlNetPipeline(**parts, controlnet=tiny.controlnet(base.unet), requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    pipe = build()
    states, loras = pair(pipe)
    keep = dict(image=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), latents=tiny.latents(pipe))
    base = run(pipe, **keep)
    with fuse(pipe, plan_of(loras, [[.7, .4]]*4), loras): mixed = run(pipe, **keep)
    assert far(mixed, run(peft(build, states, [.7, .4]), **keep)) <= 1e-4 and far(mixed, base) > 1e-3
    assert torch.equal(run(pipe, **keep), base)


@pytest.mark.parametrize("keep", [dict(n=2), dict(guidance_scale=1.), dict(guidance_scale=1., n=2), dict(guidance_scale=5., n=2, negative_prompt="a cat"), dict(guidance_rescale=.5)])
def test_batches_and_guidance(keep):
    pipe = tiny.sd()
    states, loras = pair(pipe)
    rows = [[1., 0.], [.5, .5], [0., 1.], [.2, .1]]
    with fuse(pipe, plan_of(loras, rows), loras): mixed = run(pipe, **keep)
    judge = peft(tiny.sd, states, rows[0])
    assert far(mixed, run(judge, callback_on_step_end=callback_switch(judge, rows), **keep)) <= 1e-4


def test_the_users_callback_works_as_ever():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    seen = []
    def callback(p, step, t, kwargs):
        seen.append((step, int(t)))
        return {"latents": kwargs["latents"]*0}
    with fuse(pipe, switch(loras), loras): out = run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist())) and not out.any()


def test_a_pipeline_made_in_inference_mode():
    with torch.inference_mode():
        pipe = tiny.sd()
        _, loras = pair(pipe)
        before = weights(pipe)
    for plan in (switch(loras), soft(loras)):
        with fuse(pipe, plan, loras):
            a = run(pipe)
            with torch.inference_mode(): assert torch.equal(run(pipe), a)
        assert same(pipe, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradient_modes(mode):
    pipe = tiny.sd()
    _, loras = pair(pipe)
    before = weights(pipe)
    with fuse(pipe, soft(loras), loras): want = run(pipe)
    with fuse(pipe, soft(loras), loras):
        with mode(): assert torch.equal(run(pipe).clone(), want)
        assert torch.equal(run(pipe), want)
    assert same(pipe, before)


def test_channels_last():
    pipe = tiny.sd()
    _, loras = pair(pipe, layers=WIDE)
    with fuse(pipe, soft(loras), loras): want = run(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    before = weights(pipe)
    strides = {name: p.stride() for name, p in pipe.unet.named_parameters()}
    for plan in (soft(loras), switch(loras)):
        with fuse(pipe, plan, loras): out = run(pipe)
        if plan.weights.frac().any(): assert far(out, want) <= 1e-4
        assert same(pipe, before) and strides == {name: p.stride() for name, p in pipe.unet.named_parameters()}


# ---- soft plans

@pytest.fixture(params=["alone", "batched"])
def writing(request, monkeypatch):
    "Layers written one by one, as on a CPU, and in batches, as on a GPU."
    import loramix.weights as room
    if request.param == "batched": monkeypatch.setitem(room._SCRATCH, "cpu", 1 << 20)
    else: monkeypatch.setattr(room, "_LARGE", 64)           # and ranks side by side, as in large layers
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(2, 2), (3, 1)])
def test_all_ways_to_write_are_right(writing, dtype, ranks):
    pipe = tiny.sdxl(dtype=dtype)
    _, loras = pair(pipe, layers=WIDE, ranks=ranks)
    plan, before = soft(loras), weights(pipe)
    with fuse(pipe, plan, loras) as fusion:
        run(pipe)
        assert any(len(chunk) > 1 for chunk in fusion.editor.chunks) == (writing == "batched")
        for name, row in zip(plan.layers, plan.weights[-1]):
            now, own = pipe.unet.get_submodule(name[5:]).weight, before["unet", name[5:] + ".weight"]
            exact = own.double() + sum(f.double()*lora.layers[name].dense(torch.float64) for f, lora in zip(row, loras))
            assert ((now.double() - exact).abs() <= 0.5001*torch.finfo(dtype).eps*exact.abs() + 1e-6).all()
    assert same(pipe, before)


def test_the_way_to_a_row_does_not_matter(writing):
    "The same row gives the same weights to the bit, whichever row stood there before."
    pipe = tiny.sd()
    _, loras = pair(pipe)
    for make in (switch, soft):
        plan = make(loras, 6)
        with fuse(pipe, plan, loras) as fusion:
            pipe.scheduler.set_timesteps(6)
            def state(*order):
                for i in order: fusion.go_to(pipe.scheduler.timesteps[i]); fusion.show(fusion.step)
                return weights(pipe)
            want = state(4)
            for order in ((0, 4), (3, 4), (5, 2, 4), (4, 4)): assert all(torch.equal(a, b) for a, b in zip(state(*order).values(), want.values()))


def test_tolerance_thins_the_table_and_says_so():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    ramp = torch.linspace(0, 1, 30)
    plan = plan_of(loras, torch.stack([ramp, 1 - ramp], 1))
    with fuse(pipe, plan, loras) as fusion: exact = run(pipe, steps=30); full = fusion.changes
    with fuse(pipe, plan, loras, tolerance=0.1) as fusion:
        thinned = run(pipe, steps=30)
        assert fusion.changes < full/2 and (fusion.applied - plan.weights).abs().max() <= 0.1 + 1e-6
        assert torch.equal(fusion.applied[0], plan.weights[0])
        assert far(thinned, exact) < 0.05
        assert torch.equal(run(pipe, steps=30), thinned)
        applied = dataclasses.replace(plan, choice=fusion.applied)
    with fuse(pipe, applied, loras): assert torch.equal(run(pipe, steps=30), thinned)


def test_a_hard_plan_edits_only_what_changes():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    layers = len(loras[0].denoiser)
    choice = torch.zeros(4, layers, 2); choice[..., 0] = 1
    choice[2:, 5] = torch.tensor([0., 1.])
    with fuse(pipe, plan_of(loras, choice), loras) as fusion:
        run(pipe); assert fusion.changes == layers + 1
        run(pipe); assert fusion.changes == layers + 3         # back to row 0 and over again: one layer each


# ---- text encoders

@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("policy,factors", [("both", [.7, .4]), ("subject", [.7, 0.]), ("style", [0., .4]), ("none", [0., 0.])])
def test_text_encoders_follow_the_policy(name, policy, factors):
    pipe = BUILD[name]()
    states, loras = pair(pipe, text=True)
    assert loras[0].text_encoders
    plan = plan_of(loras, [[1., 1.]]*4, strengths=(.7, .4))
    before = weights(pipe)
    with fuse(pipe, plan, loras, text_encoder=policy): mixed = run(pipe)
    assert same(pipe, before)
    judge = BUILD[name]()
    tiny.load(judge, **states)
    judge.set_adapters(["dog", "ink"], [{"unet": full, "text_encoder": text, "text_encoder_2": text} if name == "sdxl" else {"unet": full, "text_encoder": text} for full, text in zip((.7, .4), factors)])
    assert far(mixed, run(judge)) <= 1e-4


def test_text_encoders_are_needed_unless_told_otherwise():
    pipe = tiny.sd()
    _, loras = pair(pipe, text=True)
    pipe.text_encoder = None
    before = weights(pipe)
    with pytest.raises(FusionError, match='text_encoder="none"'): fuse(pipe, switch(loras), loras)
    assert same(pipe, before) and not pipe.unet._forward_pre_hooks
    with fuse(pipe, switch(loras), loras, text_encoder="none"): run(pipe, None, prompt_embeds=torch.zeros(1, 16, 16), negative_prompt_embeds=torch.zeros(1, 16, 16))


# ---- beside PEFT

def test_adapters_that_are_loaded_already_act_on_top():
    pipe = tiny.sd()
    states, loras = pair(pipe)
    third = lora_state(pipe, seed=3)
    tiny.load(pipe, own=third)
    pipe.set_adapters(["own"], [.5])
    before, alone = weights(pipe), run(pipe)
    with fuse(pipe, plan_of(loras, [[.7, .4]]*4), loras): mixed = run(pipe)
    assert same(pipe, before) and torch.equal(run(pipe), alone)
    judge = peft(tiny.sd, dict(states, own=third), [.7, .4, .5])
    assert far(mixed, run(judge)) <= 1e-4


def test_adapters_come_and_go_while_attached():
    pipe = tiny.sd()
    states, loras = pair(pipe)
    before, base, third = weights(pipe), run(pipe), lora_state(pipe, seed=3)
    fusion = fuse(pipe, plan_of(loras, [[.7, .4]]*4), loras)
    mixed = run(pipe)
    tiny.load(pipe, own=third)
    pipe.set_adapters(["own"], [.5])
    assert far(run(pipe), run(peft(tiny.sd, dict(states, own=third), [.7, .4, .5]))) <= 1e-4
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), mixed)
    tiny.load(pipe, own=third)
    fusion.remove()
    pipe.unload_lora_weights()
    assert same(pipe, before) and torch.equal(run(pipe), base)


def test_merging_an_adapter_while_attached_is_noticed():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    before = weights(pipe)
    fusion = fuse(pipe, switch(loras), loras)
    run(pipe)
    tiny.load(pipe, own=lora_state(pipe, seed=3))
    pipe.fuse_lora()
    with pytest.raises(FusionError, match="fuse_lora"): run(pipe)
    pipe.unfuse_lora(); pipe.unload_lora_weights()
    run(pipe)
    fusion.remove()
    assert same(pipe, before)


def test_a_merged_adapter_belongs_to_the_base():
    pipe = tiny.sd()
    states, loras = pair(pipe)
    third = lora_state(pipe, seed=3)
    tiny.load(pipe, own=third)
    pipe.fuse_lora(); pipe.unload_lora_weights()
    with fuse(pipe, plan_of(loras, [[.7, .4]]*4), loras): mixed = run(pipe)
    assert far(mixed, run(peft(tiny.sd, dict(states, own=third), [.7, .4, 1.]))) <= 1e-4


# ---- compiled

def compiled(pipe, how, backend):
    if how == "wrapper": pipe.unet = torch.compile(pipe.unet, backend=backend)
    elif how == "fullgraph": pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    elif how == "in place": pipe.unet.compile(backend=backend)
    else:
        for block in pipe.unet.down_blocks: block.compile(backend=backend)


@pytest.mark.parametrize("how,when", [("wrapper", "before"), ("fullgraph", "before"), ("in place", "before"), ("blocks", "before"), ("wrapper", "after"), ("in place", "after")])
def test_compiled_denoisers_follow_without_recompiling(how, when):
    from torch._dynamo.utils import counters
    torch._dynamo.reset(); counters.clear()
    pipe = tiny.sd()
    _, loras = pair(pipe)
    rows = [[1., 0.], [.5, .5], [0., 1.], [.2, .1]]
    with fuse(pipe, plan_of(loras, rows), loras): want = run(pipe)
    base = run(pipe)
    if when == "before": compiled(pipe, how, "aot_eager")
    fusion = fuse(pipe, plan_of(loras, rows), loras)
    if when == "after": compiled(pipe, how, "aot_eager")
    assert far(run(pipe), want) <= 1e-4
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1
    for _ in range(2): assert far(run(pipe), want) <= 1e-4
    assert counters["stats"]["unique_graphs"] == graphs, "no recompilation at a change of weights"
    fusion.remove()
    assert far(run(pipe), base) <= 1e-4
    torch._dynamo.reset()


# ---- offloading and other movers

def test_model_offload_brings_the_weights_first():
    "As enable_model_cpu_offload does it, with the CPU for a GPU."
    from accelerate import cpu_offload_with_hook
    pipe = tiny.sd()
    _, loras = pair(pipe, text=True)
    with fuse(pipe, switch(loras), loras): want = run(pipe)
    before = weights(pipe)
    _, hook = cpu_offload_with_hook(pipe.text_encoder, torch.device("cpu"))
    _, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"), prev_module_hook=hook)
    with fuse(pipe, switch(loras), loras) as fusion:
        assert torch.equal(run(pipe), want) and fusion.editor.backup == "cpu"
        hook.offload()
        assert torch.equal(run(pipe), want)
    assert same(pipe, before)


def test_moved_and_cast_while_attached():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    before = weights(pipe)
    half = copy.deepcopy(pipe.unet).to(torch.bfloat16).state_dict()
    fusion = fuse(pipe, soft(loras), loras)
    run(pipe)
    pipe.unet.to(torch.bfloat16); pipe.text_encoder.to(torch.bfloat16)
    run(pipe)
    fusion.remove()
    assert all(torch.equal(value, half[name]) for name, value in pipe.unet.state_dict().items())


def refused(pipe, loras, match, plan=None, **kwargs):
    "fuse() is refused with these words, and has changed nothing."
    before = weights(pipe) if not any(p.is_meta for m in pipe.components.values() if isinstance(m, torch.nn.Module) for p in m.parameters()) else None
    with pytest.raises(FusionError, match=match) as info: fuse(pipe, plan or switch(loras), loras, **kwargs)
    assert "\n" not in str(info.value)
    if before: assert same(pipe, before)
    name, module = denoiser(pipe)
    module = getattr(module, "module", module)
    assert not module._forward_pre_hooks and not module._forward_hooks and "_loramix_fusion" not in module.__dict__


def test_refuses_sequential_offload():
    from accelerate import cpu_offload
    pipe = tiny.sd()
    _, loras = pair(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=False)
    refused(pipe, loras, "sequential CPU offload.*enable_model_cpu_offload")


def test_sequential_offload_while_attached():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules
    pipe = tiny.sd()
    _, loras = pair(pipe)
    before = weights(pipe)
    fusion = fuse(pipe, switch(loras), loras)
    run(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=False)
    with pytest.raises(FusionError, match="sequential CPU offload"): run(pipe)
    with pytest.raises(FusionError, match="sequential CPU offload"): fusion.remove()
    remove_hook_from_submodules(pipe.unet)
    fusion.remove()
    assert same(pipe, before)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_refuses_group_offload(kind):
    from diffusers.hooks import apply_group_offloading
    def offload(pipe): apply_group_offloading(pipe.unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, **({"num_blocks_per_group": 1} if kind == "block_level" else {}))
    pipe = tiny.sd()
    _, loras = pair(pipe)
    offload(pipe)
    refused(pipe, loras, "Group offloading")
    pipe = tiny.sd()
    fusion = fuse(pipe, switch(loras), loras)
    offload(pipe)
    with pytest.raises(FusionError, match="Group offloading"): run(pipe)
    fusion.remove()


def test_refuses_float8_and_layerwise_casting():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    refused(pipe, loras, "float8")


def test_refuses_tensor_subclasses_and_strange_layers():
    class Packed(torch.Tensor): pass
    pipe = tiny.sd()
    _, loras = pair(pipe)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    plain = layer.weight
    layer.weight = torch.nn.Parameter(plain.data.as_subclass(Packed))
    refused(pipe, loras, "Packed|quantised")
    layer.weight = plain
    torch.nn.utils.parametrizations.weight_norm(layer)
    refused(pipe, loras, "weight of their own")


def test_refuses_data_parallel():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    pipe.unet = torch.nn.DataParallel(pipe.unet)
    with pytest.raises(FusionError, match="DataParallel"): fuse(pipe, switch(loras), loras)


@pytest.mark.parametrize("name", BUILD)
def test_fused_projections(name):
    pipe = BUILD[name]()
    _, loras = pair(pipe)
    base = run(pipe)
    denoiser(pipe)[1].fuse_qkv_projections()
    refused(pipe, loras, "unfuse_qkv_projections")
    denoiser(pipe)[1].unfuse_qkv_projections()
    with fuse(pipe, switch(loras), loras):
        mixed = run(pipe)
        denoiser(pipe)[1].fuse_qkv_projections()
        with pytest.raises(FusionError, match="unfuse_qkv_projections"): run(pipe)
        denoiser(pipe)[1].unfuse_qkv_projections()
        assert torch.equal(run(pipe), mixed)
    assert torch.equal(run(pipe), base)


def test_refuses_a_second_mix():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with fuse(pipe, switch(loras), loras):
        mixed = run(pipe)
        for p in (pipe, other):
            with pytest.raises(FusionError, match="attached.*already"): fuse(p, switch(loras), loras)
        assert torch.equal(run(pipe), mixed)
    with fuse(other, switch(loras), loras): pass
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with fuse(pipe, switch(loras), loras), pytest.raises(FusionError, match="attached.*already"): fuse(other, switch(loras), loras)


def test_refuses_loras_for_another_base():
    sd, xl, flux = tiny.sd(), tiny.sdxl(), tiny.flux()
    _, ours = pair(sd)
    for pipe in (xl, flux): refused(pipe, ours, "LoRA for another base")
    name = next(iter(ours[0].layers))
    wide = dataclasses.replace(ours[0], layers={**ours[0].layers, name: LowRank(torch.zeros(2, 99), torch.zeros(8, 2), 1.)})
    refused(sd, [wide, ours[1]], r"\[8, 99\].*\[8, 8\].*another base")
    nothing = [dataclasses.replace(lora, layers={}) for lora in ours]
    refused(sd, nothing, "nothing to mix", plan=switch(ours))
    lost = dataclasses.replace(ours[0], layers={**ours[0].layers, "unet.gone.to_q": ours[0].layers[name]})
    refused(sd, [lost, ours[1]], "unet.gone.to_q")


def test_refuses_a_plan_that_does_not_fit():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    refused(pipe, loras[::-1], "in this order", plan=switch(loras))
    refused(pipe, loras[:1], "in this order", plan=switch(loras))
    extra = plan_of([dataclasses.replace(loras[0], layers={**loras[0].layers, "unet.gone": 0}), loras[1]], [[1., 0.]]*4)
    refused(pipe, loras, "none of its LoRAs has", plan=extra)
    refused(pipe, loras, "whose text encoder", text_encoder="all")
    refused(pipe, loras, "backup says", backup="disk")
    refused(pipe, loras, "tolerance", tolerance=-1.)
    with fuse(pipe, switch(loras, 4), loras):
        with pytest.raises(FusionError, match="has 4 steps and this run has 6"): run(pipe, steps=6)
        run(pipe, steps=4)
    with fuse(pipe, switch(loras, 4), loras, resample=True) as fusion:
        run(pipe, steps=6); assert fusion.plan.steps == 6
    with fuse(pipe, lambda n: switch(loras, min(n, 50)), loras):
        with pytest.raises(FusionError, match="asked for a plan of 60 steps"): run(pipe, steps=60)


def test_a_denoiser_called_by_hand_or_by_another_scheduler():
    pipe = tiny.sd(scheduler=DDIMScheduler(**NOISE))
    _, loras = pair(pipe)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 16)
    with fuse(pipe, switch(loras, 10), loras) as fusion, torch.no_grad():
        with pytest.raises(FusionError, match="No schedule is set"): pipe.unet(x, 500, text)
        pipe.scheduler.set_timesteps(10)
        pipe.unet(x, 801, text); assert fusion.step == 1
        pipe.unet(x, timestep=torch.tensor([1]), encoder_hidden_states=text); assert fusion.step == 9
        with pytest.raises(FusionError, match="not among the 10 timesteps"): pipe.unet(x, 500, text)
        with pytest.raises(FusionError, match="without a timestep"): pipe.unet(x, encoder_hidden_states=text)
        run(pipe, steps=10)


def test_two_threads_in_one_denoiser():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    before = weights(pipe)
    fusion = fuse(pipe, switch(loras), loras)
    want = run(pipe)
    inside, go, errors = threading.Event(), threading.Event(), []
    def wait(*args): inside.set(); go.wait(10)
    handle = pipe.unet.mid_block.register_forward_hook(wait)
    results = []
    thread = threading.Thread(target=lambda: results.append(run(pipe)))
    thread.start(); inside.wait(10)
    handle.remove()
    with pytest.raises(FusionError, match="Two threads"): fusion.denoiser(torch.randn(1, 4, 8, 8), pipe.scheduler.timesteps[0], torch.randn(1, 16, 16))
    with pytest.raises(FusionError, match="Another thread"): fusion.remove()
    go.set(); thread.join()
    assert torch.equal(results[0], want) and torch.equal(run(pipe), want)
    fusion.remove()
    assert same(pipe, before)


def test_copying_a_denoiser_with_a_mix_is_refused():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    with fuse(pipe, switch(loras), loras), pytest.raises(FusionError, match="copied"): copy.deepcopy(pipe.unet)
    copy.deepcopy(pipe.unet)


# ---- memory

def test_memory_is_the_copy_of_what_the_plan_touches():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    choice = torch.zeros(4, len(loras[0].denoiser), 2); choice[:, :5, 0] = 1
    plan = plan_of(loras, choice)
    with fuse(pipe, plan, loras) as fusion:
        run(pipe)
        kept = [site for site in fusion.editor.sites if site.saved is not None]
        assert [site.name for site in kept] == list(plan.layers[:5])
        files = {t.untyped_storage().data_ptr() for lora in loras for u in lora.layers.values() for t in (u.up, u.down)}
        assert all(f[0].untyped_storage().data_ptr() in files for site in kept for f in site.factors), "on the same device the LoRAs' own tensors are used"
    assert all(site.saved is None and not site.factors for site in fusion.editor.sites)


# ---- the unconditional half

def guided_by_hand(pipe, loras, plan, steps, scale=7.5, n=1, prompt="a dog in ink"):
    "Guidance with a UNet of its own for each half and step, weights set by hand."
    unet, scheduler = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.scheduler)
    yes, no = pipe.encode_prompt(prompt, "cpu", n, True)
    scheduler.set_timesteps(steps)
    x = tiny.latents(pipe, n)*scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        halves = []
        for table, text in ((plan.unconditional, no), (plan.weights, yes)):
            for name, row in zip(plan.layers, table[i]):
                own = pipe.unet.get_submodule(name.removeprefix("unet.")).weight
                unet.get_submodule(name.removeprefix("unet.")).weight.data = own + sum(f.item()*lora.layers[name].dense() for f, lora in zip(row, loras))
            with torch.no_grad(): halves.append(unet(scheduler.scale_model_input(x, t), t, text).sample)
        x = scheduler.step(halves[0] + scale*(halves[1] - halves[0]), t, x).prev_sample
    return x


@pytest.mark.parametrize("n", [1, 2])
def test_a_table_of_its_own_for_the_unconditional_half(n):
    pipe = tiny.sd()
    _, loras = pair(pipe)
    plan = soft(loras, 3)
    choice = plan.choice.clone(); choice[1:] = 0                        # no LoRA in the unconditional half from step 1 on; the same in step 0
    plan = dataclasses.replace(plan, unconditional_choice=choice)
    before = weights(pipe)
    want = guided_by_hand(pipe, loras, plan, 3, n=n)
    with fuse(pipe, plan, loras) as fusion:
        mixed = run(pipe, steps=3, n=n)
        assert far(mixed, want) <= 1e-4 and torch.equal(run(pipe, steps=3, n=n), mixed)
        unguided = run(pipe, steps=3, n=n, guidance_scale=1.)
        x = tiny.latents(pipe)
        with pytest.raises(FusionError, match=r"\(batch 3\) does not"):
            run(pipe, steps=3); pipe.scheduler.set_timesteps(3)
            pipe.unet(torch.randn(3, 4, 8, 8), pipe.scheduler.timesteps[1], torch.randn(3, 16, 16))
    assert same(pipe, before)
    with fuse(pipe, dataclasses.replace(plan, unconditional_choice=None), loras): assert far(run(pipe, steps=3, n=n, guidance_scale=1.), unguided) <= 1e-6


def test_unconditional_with_sdxl_controlnet_shapes_and_compile():
    pipe = tiny.sdxl()
    _, loras = pair(pipe)
    plan = dataclasses.replace(soft(loras, 3), unconditional_choice=torch.zeros(3, len(loras[0].denoiser), 2))
    before = weights(pipe)
    with fuse(pipe, plan, loras): mixed = run(pipe, steps=3)
    with fuse(pipe, dataclasses.replace(plan, unconditional_choice=None), loras): assert far(run(pipe, steps=3), mixed) > 1e-4
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    with fuse(pipe, plan, loras): assert far(run(pipe, steps=3), mixed) <= 1e-4
    torch._dynamo.reset()


def test_unconditional_is_refused_for_transformers():
    pipe = tiny.flux()
    _, loras = pair(pipe)
    plan = dataclasses.replace(switch(loras), unconditional_choice=torch.zeros(4, len(loras[0].denoiser), 2))
    refused(pipe, loras, "needs a UNet", plan=plan)


def test_it_says_what_it_is():
    pipe = tiny.sd()
    _, loras = pair(pipe)
    plan = switch(loras)
    fusion = fuse(pipe, plan, loras)
    assert isinstance(fusion, Fusion) and fusion.pipe is pipe and fusion.denoiser is pipe.unet and fusion.component == "unet" and fusion.step is None and fusion.plan is plan and fusion.changes == 0
    assert "attached" in repr(fusion)
    run(pipe)
    fusion.remove()
    assert "removed" in repr(fusion) and fusion.step == 3
