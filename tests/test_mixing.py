"The front door on random pipelines of the true classes: same pixels, recipes, several LoRAs, errors that leave the pipeline as it was."
import json
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file

import tiny
from loramix.mixing import Picture, explain, load, mix
from loramix.plan import Plan
from loramix.probes import discrepancy, find_encoder
from loramix.rules import direct, est
from loramix.scores import score
from loramix.steps import FusionError

SIZE = dict(height=16, width=16)


def colours(images):
    "An encoder of the test's own: the pictures shrunk to 4 × 4 pixels."
    return torch.stack([torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).flatten() - 90 for image in images])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path/"cache"))


@pytest.fixture
def files(tmp_path):
    "Subject, style and a third LoRA for the tiny Stable Diffusion pipeline, as files."
    pipe, paths = tiny.sd(), {}
    for seed, name in enumerate(("robot", "ink", "fast"), 1):
        paths[name] = str(tmp_path/f"{name}.safetensors")
        save_file(tiny.lora_state(pipe, seed=seed, text=name != "fast"), paths[name])
    return paths


def weights(pipe):
    "Every number of a pipeline's models."
    return {f"{part}.{key}": value.clone() for part, module in pipe.components.items() if isinstance(module, torch.nn.Module) for key, value in module.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def pixels(image): return np.asarray(image)


def test_the_whole_way_and_back(files):
    pipe = tiny.sd()
    before = weights(pipe)
    with mix(pipe, files["robot"], files["ink"], encoder=colours) as mixed:
        with pytest.raises(RuntimeError, match="not known yet"): mixed.plan
        with pytest.raises(RuntimeError, match="not known yet"): pipe("a robot", num_inference_steps=2, **SIZE)
        first = mixed("a robot in ink", seed=3, num_inference_steps=5, **SIZE)
        assert isinstance(first, Image.Image) and mixed.plan.steps == 5 and 0 < mixed.discrepancy.value < 2
        assert mixed.plan.rule["discrepancy"] == mixed.discrepancy.value
        mixed("another prompt", seed=4, num_inference_steps=9, **SIZE)
        assert mixed.plan.steps == 9
        again = mixed("a robot in ink", seed=3, num_inference_steps=5, **SIZE)
        assert np.array_equal(pixels(first), pixels(again))
        by_pipe = pipe("a robot in ink", generator=torch.Generator().manual_seed(3), num_inference_steps=5, **SIZE).images[0]
        assert np.array_equal(pixels(first), pixels(by_pipe))
    assert same(weights(pipe), before)
    with pytest.raises(RuntimeError, match="has been removed"): mixed("a robot")
    plain = pipe("a robot in ink", generator=torch.Generator().manual_seed(3), num_inference_steps=5, **SIZE).images[0]
    assert not np.array_equal(pixels(first), pixels(plain))


def test_soft_is_est_made_soft_in_the_conditional_half(files):
    pipe, run = tiny.sd(), dict(seed=3, num_inference_steps=4, guidance_scale=4., **SIZE)
    with mix(pipe, files["robot"], files["ink"], rule="soft", encoder=colours) as named:
        image, beta = named("a robot in ink", **run), named.beta
        recipe = named.recipe()
    with load(pipe, recipe) as again: assert np.array_equal(pixels(again.replay()), pixels(image))
    with mix(pipe, files["robot"], files["ink"], discrepancy=beta, temperature=.5, conditional_only=True) as spelt: assert np.array_equal(pixels(spelt("a robot in ink", **run)), pixels(image))
    with mix(pipe, files["robot"], files["ink"], discrepancy=beta) as hard: assert not np.array_equal(pixels(hard("a robot in ink", **run)), pixels(image))


def test_discrepancy_against_diffusers_own_loading(files):
    "The probe pictures are those that diffusers draws with each LoRA loaded by itself."
    pipe = tiny.sd()
    found = discrepancy(pipe, files["robot"], files["ink"], "a robot in ink", seeds=(0, 5), encoder=colours, num_inference_steps=4, **SIZE)
    for side, name in enumerate(("robot", "ink")):
        other = tiny.sd()
        other.load_lora_weights(files[name])
        for pair, seed in zip(found.pictures, (0, 5)):
            theirs = other("a robot in ink", generator=torch.Generator().manual_seed(seed), num_inference_steps=4, **SIZE).images[0]
            assert np.abs(pixels(theirs).astype(int) - pixels(pair[side])).max() <= 1
    a, b = (torch.nn.functional.normalize(colours([pair[i] for pair in found.pictures]).double(), dim=1) for i in (0, 1))
    assert found.values == pytest.approx((1 - (a*b).sum(1)).tolist(), abs=1e-9)
    assert found.value == pytest.approx(np.mean(found.values)) and found.spread == pytest.approx(np.std(found.values, ddof=1))


def test_probe_cache_is_by_content(files, monkeypatch):
    from loramix.probes import Encoder
    encoder, pipe = Encoder("colours", colours, key="colours v1"), tiny.sd()
    ask = lambda pipe=pipe, prompt="a robot", **kwargs: discrepancy(pipe, files["robot"], files["ink"], prompt, encoder=encoder, num_inference_steps=3, **SIZE, **kwargs)
    first = ask()
    runs = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: runs.append(1))
    kept = ask()
    assert kept.value == first.value and not runs
    assert np.array_equal(pixels(kept.pictures[0][0]), pixels(first.pictures[0][0]))
    for other in (dict(prompt="a cat"), dict(seeds=(1,)), dict(guidance_scale=2.), dict(strengths=(1., .5))):
        count = len(runs)
        ask(**other)
        assert len(runs) > count, other
    handle.remove()
    other = tiny.sd(seed=7)
    assert ask(other).value != first.value


def test_probe_each_measures_for_every_new_prompt(files):
    with mix(tiny.sd(), files["robot"], files["ink"], encoder=colours, probe="each") as mixed:
        seen = []
        for prompt in ("one", "two", "two"):
            mixed(prompt, seed=0, num_inference_steps=2, **SIZE)
            seen.append(mixed.discrepancy)
    assert seen[0] is not seen[1] and seen[1] is seen[2] and seen[1].prompt == "two"


def test_a_change_that_the_pipeline_refuses_changes_nothing():
    pipe = tiny.flux()
    with mix(pipe, tiny.lora_state(pipe, seed=1), tiny.lora_state(pipe, seed=2), discrepancy=.4) as mixed:
        image, settings = mixed("a robot", seed=1, num_inference_steps=2, **SIZE), mixed.settings
        with pytest.raises(FusionError, match="conditional_only=False"): mixed.change(rule="soft")
        assert mixed.settings is settings and mixed.pictures and mixed.recipe()["rule"]["name"] == "est"
        assert np.array_equal(pixels(mixed("a robot", seed=1, num_inference_steps=2, **SIZE)), pixels(image))
        mixed.change(rule="soft", conditional_only=False)
        assert not np.array_equal(pixels(mixed("a robot", seed=1, num_inference_steps=2, **SIZE)), pixels(image))


def test_both_in_full_first_is_explained():
    pipe = tiny.sd()
    scores = score(tiny.lora_state(pipe, seed=1), tiny.lora_state(pipe, seed=2))
    words = lambda together: explain(est(scores, 10, discrepancy=.1, together=together))
    assert "Until step 3 both act in full." in words(.4) and "with the subject from step 4 to last" in words(.4)
    assert words(.4).endswith("change hands on the way.") and "Until" not in words(0.)
    counts = lambda text: [int(n) for n in re.findall(r"(\d+) (?:layers stay|with the style|change hands)", text)]
    acts = est(scores, 10, discrepancy=.1).choice[4:, :, 0] > .5
    assert counts(words(.4)) == [int(acts.all(0).sum()), int((~acts).all(0).sum()), int((acts.any(0) & ~acts.all(0)).sum())]


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl, tiny.flux])
def test_direct_is_peft(make, tmp_path):
    pipe, states = make(), [tiny.lora_state(make(), seed=seed) for seed in (1, 2)]
    with mix(pipe, *states, rule="direct", strengths=(.7, .4)): ours = tiny.run(pipe)
    tiny.load(pipe, robot=states[0], ink=states[1])
    pipe.set_adapters(["robot", "ink"], [.7, .4])
    theirs = tiny.run(pipe)
    assert ((ours - theirs).norm()/theirs.norm()).item() <= 1e-4


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, lambda **k: DPMSolverMultistepScheduler(use_karras_sigmas=True, **k), HeunDiscreteScheduler])
def test_recipe_replays_to_the_same_pixels(files, tmp_path, scheduler):
    pipe = tiny.sd(scheduler=scheduler(**tiny.NOISE))
    with mix(pipe, files["robot"], files["ink"], encoder=colours, always=files["fast"], always_strengths=.3, strengths=(1., .8), temperature=.5, balance="magnitude") as mixed:
        image = mixed("a robot in ink", seed=11, num_inference_steps=6, guidance_scale=4., negative_prompt="red", **SIZE)
        recipe = mixed.save(tmp_path/"recipe.json")
        image.save(tmp_path/"image.png")
    fresh = tiny.sd(scheduler=scheduler(**tiny.NOISE))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for source in (recipe, tmp_path/"image.png", json.loads(recipe.read_text())):
            with load(fresh, source) as again: assert np.array_equal(pixels(again.replay()), pixels(image))


def test_recipe_of_a_plan_or_a_function_replays(files, tmp_path):
    pipe = tiny.sd()
    scores = score(files["robot"], files["ink"])
    halves = lambda scores, steps, strengths=None: direct(scores, steps, strengths=[s/2 for s in strengths])
    for rule in (est(scores, 4, discrepancy=.4), halves):
        with mix(pipe, files["robot"], files["ink"], rule=rule, always=[files["fast"]]) as mixed:
            image = mixed("a robot", seed=1, num_inference_steps=4, **SIZE)
            recipe = mixed.save(tmp_path/"own.json")
        with load(pipe, recipe) as again: assert np.array_equal(pixels(again.replay()), pixels(image))


def test_recipe_notices_another_file_base_and_scheduler(files, tmp_path):
    pipe = tiny.sd()
    with mix(pipe, files["robot"], files["ink"], discrepancy=.4) as mixed:
        mixed("a robot", seed=1, num_inference_steps=2, **SIZE)
        recipe = mixed.save(tmp_path/"recipe.json")
    with pytest.warns(UserWarning, match="another base model"), load(tiny.sd(seed=5), recipe): pass
    with pytest.warns(UserWarning, match="another scheduler"), load(tiny.sd(scheduler=EulerDiscreteScheduler(**tiny.NOISE)), recipe): pass
    save_file(tiny.lora_state(pipe, seed=9), files["ink"])
    with pytest.raises(ValueError, match="another 'ink'"): load(pipe, recipe)
    for text, message in (("no json", "is not"), ("{}", "no loramix recipe"), ('{"kind": "loramix recipe", "schema": 9}', "Update loramix")):
        (tmp_path/"bad.json").write_text(text)
        with pytest.raises(ValueError, match=message): load(pipe, tmp_path/"bad.json")
    Image.new("RGB", (4, 4)).save(tmp_path/"plain.png")
    with pytest.raises(ValueError, match="no recipe"): load(pipe, tmp_path/"plain.png")
    with pytest.raises(FileNotFoundError, match="nowhere"): load(pipe, tmp_path/"nowhere.json")


def test_saved_png_carries_the_recipe_however_it_is_saved(files, tmp_path):
    with mix(tiny.sd(), files["robot"], files["ink"], discrepancy=.4) as mixed:
        two = mixed("a robot", seed=1, num_inference_steps=2, num_images_per_prompt=2, **SIZE)
    assert len(two) == 2 and all(isinstance(image, Picture) for image in two)
    two[1].save(tmp_path/"a.png")
    with open(tmp_path/"b.png", "wb") as file: two[1].save(file, format="PNG")
    for name in ("a.png", "b.png"):
        found = json.loads(Image.open(tmp_path/name).text["loramix"])
        assert found["call"]["seed"] == 1 and found["index"] == 1 and found["loras"][0]["name"] == "robot"
    two[0].save(tmp_path/"c.jpg")
    assert Image.open(tmp_path/"c.jpg").size == two[0].size


def test_image_to_image_probes_with_the_same_picture(files):
    base = tiny.sd()
    pipe = AutoPipelineForImage2Image.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.effect_noise((16, 16), 80).convert("RGB")
    with mix(pipe, files["robot"], files["ink"], encoder=colours) as mixed:
        a = mixed("a robot", image=picture, strength=.5, num_inference_steps=10, seed=2)
        b = mixed("a robot", image=picture, strength=.5, num_inference_steps=10, seed=2)
        assert np.array_equal(pixels(a), pixels(b)) and mixed.plan.steps == 10 and mixed.fusion.step == 9
        assert mixed.recipe()["call"]["missing"] == ["image"]


def test_several_subjects_and_the_same_file_twice(files):
    pipe = tiny.sd()
    before = weights(pipe)
    with mix(pipe, [files["robot"], files["fast"], files["robot"]], files["ink"], discrepancy=.5, strengths=(.5, 1.)) as mixed:
        mixed("two robots", seed=0, num_inference_steps=3, **SIZE)
        assert mixed.plan.loras == ("robot", "fast", "robot (2)", "ink") and mixed.plan.strengths == (.5, .5, .5, 1.)
    assert same(weights(pipe), before)


def test_noise_clock_follows_the_schedule(files):
    pipe = tiny.sd(scheduler=DPMSolverMultistepScheduler(use_karras_sigmas=True, **tiny.NOISE))
    with mix(pipe, files["robot"], files["ink"], discrepancy=.3, time="noise") as mixed:
        mixed("a robot", seed=0, num_inference_steps=8, **SIZE)
        sigmas = pipe.scheduler.sigmas[:8].double()
        assert mixed.plan.progress == pytest.approx((1 - sigmas/sigmas.max()).tolist(), abs=1e-6)
        pipe.scheduler = EulerDiscreteScheduler(**tiny.NOISE)
        mixed("a robot", seed=0, num_inference_steps=8, **SIZE)
        sigmas = pipe.scheduler.sigmas[:8].double()
        assert mixed.plan.progress == pytest.approx((1 - sigmas/sigmas.max()).tolist(), abs=1e-6)


def test_trigger_words_are_asked_for(tmp_path):
    pipe = tiny.sd()
    path = str(tmp_path/"robot.safetensors")
    save_file(tiny.lora_state(pipe), path, metadata={"modelspec.trigger_phrase": "sks robot"})
    with mix(pipe, path, tiny.lora_state(pipe, seed=2), discrepancy=.5) as mixed:
        assert "sks robot" in repr(mixed)
        with pytest.warns(UserWarning, match="sks robot"): mixed("a dog", seed=0, num_inference_steps=1, **SIZE)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            mixed("a SKS robot", seed=0, num_inference_steps=1, **SIZE)


BAD = [
    (dict(subject="missing.safetensors"), "missing.safetensors"),
    (dict(rule="magic"), "magic"),
    (dict(temprature=1.), "temprature"),
    (dict(strengths=(1., 2., 3.)), "3"),
    (dict(strengths=(1., float("nan"))), "finite"),
    (dict(discrepancy=-1.), "at least 0"),
    (dict(discrepancy=float("nan")), "at least 0"),
    (dict(pattern="t"), "pattern"),
    (dict(probe="often"), "often"),
    (dict(backup="disk"), "disk"),
    (dict(text_encoder="all"), "all"),
    (dict(balance="loud"), "loud"),
    (dict(always_strengths=(1., 1.)), "2"),
]


@pytest.mark.parametrize("change,words", BAD, ids=[next(iter(change)) + str(i) for i, (change, _) in enumerate(BAD)])
def test_bad_input_leaves_the_pipeline_as_it_was(files, change, words):
    pipe = tiny.sd()
    before, hooks = weights(pipe), len(pipe.unet._forward_pre_hooks)
    settings = {"subject": files["robot"], "style": files["ink"], **change}
    with pytest.raises((ValueError, TypeError, OSError, FusionError)) as caught: mix(pipe, settings.pop("subject"), settings.pop("style"), **settings)
    text = str(caught.value)
    assert words in text and "\n" not in text
    assert same(weights(pipe), before) and len(pipe.unet._forward_pre_hooks) == hooks
    with mix(pipe, files["robot"], files["ink"], discrepancy=.5) as mixed: mixed("a robot", seed=0, num_inference_steps=1, **SIZE)


def test_another_base_a_second_mix_and_a_failed_probe(files):
    pipe = tiny.sd()
    before = weights(pipe)
    with pytest.raises(FusionError, match="another base"): mix(tiny.sdxl(), files["robot"], files["ink"])
    with mix(pipe, files["robot"], files["ink"]):
        with pytest.raises(FusionError, match="already"): mix(pipe, files["robot"], files["ink"], discrepancy=.5)
    def broken(images): raise ValueError("no eyes")
    with pytest.raises(ValueError, match="no eyes"): mix(pipe, files["robot"], files["ink"], prompt="a robot", encoder=broken)
    assert same(weights(pipe), before)
    with pytest.raises(ValueError, match="at least 1; got 0"), mix(pipe, files["robot"], files["ink"], discrepancy=.5) as mixed:
        mixed("a robot", seed=0, num_inference_steps=0, **SIZE)
    assert same(weights(pipe), before)


def test_plan_of_another_length_needs_resample(files):
    pipe = tiny.sd()
    plan = est(score(files["robot"], files["ink"]), 6, discrepancy=.4)
    with mix(pipe, files["robot"], files["ink"], rule=plan) as mixed:
        assert isinstance(mixed.plan, Plan)
        with pytest.raises(FusionError, match="6 steps"): mixed("a robot", seed=0, num_inference_steps=4, **SIZE)
    with mix(pipe, files["robot"], files["ink"], rule=plan, resample=True) as mixed:
        mixed("a robot", seed=0, num_inference_steps=4, **SIZE)
        assert torch.equal(mixed.plan.choice, plan.resample(4).choice)


def test_encoder_without_weights_is_an_error_not_a_guess(monkeypatch):
    from loramix.probes import dino_encoder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import timm
    def offline(*args, **kwargs): raise FileNotFoundError("cannot find the requested files in the local cache")
    monkeypatch.setattr(timm, "create_model", offline)
    dino_encoder.cache_clear()
    with pytest.raises(RuntimeError, match="discrepancy=0.5"): find_encoder(None, tiny.sd())
