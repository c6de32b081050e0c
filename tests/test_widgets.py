"The explorer and its parts without a kernel: every handler, on the small world and on a plan as large as SDXL's."
import gc
import io
import json
import threading

import ipywidgets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import loramix
import tiny
from loramix import est, klora, score, switch
from loramix.controls import Controls, Layers, Steps
from loramix.mixing import load, mix
from loramix.plan import Plan
from loramix.scores import balance
from loramix.stage import Stage, State, contest, layer_label, layer_words, plan_of, show, stage_png
from loramix.widgets import explore
from sized import sdxl_layers, sdxl_scores

SIZE = dict(height=16, width=16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path/"cache"))


@pytest.fixture(autouse=True)
def no_widgets_left():
    "Widgets of a test are forgotten after it, as a closed notebook would do."
    yield
    ipywidgets.Widget.close_all()


@pytest.fixture(scope="module")
def large(): return sdxl_scores()


def mixed(**kwargs):
    "A mix of two LoRAs in memory on a tiny pipeline."
    pipe = tiny.sd()
    return mix(pipe, tiny.lora_state(pipe, seed=1), tiny.lora_state(pipe, seed=2), **{"discrepancy": .4312, **kwargs})


def explorer(**kwargs): return mixed(**kwargs).explore(prompt="a dog", steps=4, **SIZE)


def picture(data):
    assert data[:4] == b"\x89PNG"
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# What is on screen

SETTINGS = {
    "beta": lambda c: setattr(c.beta, "value", .9), "alpha": lambda c: setattr(c.alpha, "value", 3.), "gamma": lambda c: setattr(c.gamma, "value", 3.2),
    "temperature": lambda c: setattr(c.temperature, "value", .6), "pattern": lambda c: setattr(c.pattern, "value", "s*"), "balance": lambda c: setattr(c.balance, "value", "none"),
    "steps": lambda c: setattr(c.steps, "value", 31), "klora": lambda c: setattr(c.rule, "value", "klora"), "topk": lambda c: setattr(c.rule, "value", "topk"),
    "direct": lambda c: setattr(c.rule, "value", "direct"), "switch": lambda c: setattr(c.rule, "value", "switch")}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_knob_changes_the_picture_to_the_rules_plan(large, name):
    e = explore(large, steps=20)
    before = e.image.value
    SETTINGS[name](e.controls)
    assert e.image.value != before and picture(e.image.value).shape == (int(e.image.height), int(e.image.width), 3)
    assert torch.equal(e.plan.choice, plan_of(e.controls.state, large).choice) and not e.problem.value
    acts = e.plan.choice[..., 0].numpy()
    if e.fight is not None and not e.state.options.get("temperature"): assert np.array_equal(e.fight.ratio[None] > e.fight.ramp[:, None], acts == 1)
    e.reset.click()
    assert e.controls.state == e.start and e.image.value == before


def test_strengths_change_the_weights_and_not_the_choice(large):
    e = explore(large, steps=9)
    choice = e.plan.choice
    e.controls.strengths[1].value = .5
    assert torch.equal(e.plan.choice, choice) and torch.equal(e.plan.weights[..., 1], choice[..., 1]*.5)


def test_measured_values_are_exact_until_moved():
    e = explorer()
    assert e.plan.rule["discrepancy"] == .4312 and "measured 0.431" in e.controls.knobs["beta"].marks.value
    gamma = balance(e.scores)[0]
    assert e.controls.knobs["gamma"].value == gamma and e.controls.balance.value == "energy"
    e.controls.gamma.value = e.controls.gamma.value*(1 + 1e-12)             # what a browser may send back
    assert e.controls.balance.value == "energy" and e.plan.rule["gamma"] == [gamma]
    e.controls.gamma.value = 2*gamma
    assert e.controls.balance.value == "by hand" and e.plan.rule["gamma"] == [2*gamma]
    e.controls.beta.value = .44
    assert e.plan.rule["discrepancy"] == .44


def test_step_and_layer(large):
    e = explore(large, steps=10)
    e.steps.slider.value = 7
    assert e.stage.frame.get_x() == 6.5 and "<b>Step 7</b> of 0 … 9" in e.words.value
    turning = int(np.flatnonzero((np.diff(e.plan.choice[..., 0].numpy(), axis=0) != 0).sum(0) == 1)[0])
    at = int(np.flatnonzero(np.diff(e.plan.choice[:, turning, 0].numpy()))[0]) + 1
    e.layers.height.value = -int(e.stage.rows.top[e.stage.rows.order.index(turning)])
    assert e.layers.value == turning and f"at step {at} (p" in e.words.value and layer_label(large.layers[turning]).endswith(e.layers.layer.label)
    e.layers.block.value = "mid"
    assert large.layers[e.layers.value].startswith("unet.mid_block") and -e.layers.height.value == e.stage.rows.top[e.stage.rows.order.index(e.layers.value)]
    e.controls.steps.value = 5
    assert e.steps.slider.value == 4 and e.steps.play.max == 4


def test_every_layer_can_be_chosen_in_each_way(large):
    e = Layers(large.layers, Stage(large).rows)
    assert sorted(sum(e.blocks.values(), [])) == list(range(560))
    for row, top in enumerate(e.rows.top):
        e.height.value = -int(top)
        assert e.value == e.rows.order[row]
    for layer in (0, 559, 300):
        e.choose(layer)
        assert (e.value, e.layer.value, e._at_height()) == (layer,)*3


def test_words_of_all_layers(large):
    for plan in (est(large, 20), est(large, 20, pattern="s*", discrepancy=1.2), est(large, 1), est(large, 20, temperature=.4), switch(large, 20)):
        fight = contest(plan, large)
        for layer in range(0, 560, 37):
            words = layer_words(plan, large, layer, fight, plan.steps - 1)
            assert f"{large.energy[layer, 0]:.3g} in {large.loras[0]}" in words and "nan" not in words
            assert words.count("both act") == (plan.choice[-1, layer] > 0).all()


def test_layers_of_one_file_only():
    pipe = tiny.sd()
    one, two = tiny.lora_state(pipe, seed=1), tiny.lora_state(pipe, seed=2, layers=("to_q", "to_k"))
    e = explore(score(one, two), steps=6)
    alone = next(i for i, here in enumerate(e.scores.present) if not here.all())
    e.layers.choose(alone)
    assert "Only state dict holds this layer" in e.words.value
    assert "above the frame" in e.stage.above.get_text()


def test_what_a_rule_refuses_is_said(large):
    pipe = tiny.sd()
    state = tiny.lora_state(pipe, seed=2)
    first = next(key for key in state if "lora_A" in key)
    state[first] = torch.zeros_like(state[first])
    e = explore(score(tiny.lora_state(pipe, seed=1), state), steps=6)
    before = e.image.value
    e.controls.balance.value = "official"
    assert "balance=&quot;energy&quot; copes" in e.problem.value and e.image.value == before
    e.controls.balance.value = "energy"
    assert e.problem.value == ""
    with pytest.raises(TypeError, match="takes a Mix"): explore(pipe)
    with pytest.raises(AttributeError, match="its sliders are"): e.controls.speed


# Drawing

def test_generate_draws_what_is_on_screen():
    e = explorer()
    pipe = e.mix.pipe
    e.controls.alpha.value, e.controls.strengths[1].value = 2.5, .7
    e.runner.seed.value = 5
    e.runner.go.click()
    e.runner.wait()
    assert e.runner.error is None and picture(e.runner.shown.value).any() and (e.runner.bar.value, e.runner.bar.max) == (4, 4)
    assert torch.equal(e.mix.plan.choice, e.plan.choice) and e.mix.settings.strengths == (1., .7)
    drawn = np.asarray(e.runner.image)
    e.mix.remove()
    fresh = mix(pipe, tiny.lora_state(pipe, seed=1), tiny.lora_state(pipe, seed=2), discrepancy=.4312, alpha=2.5, strengths=(1., .7))
    assert np.array_equal(drawn, np.asarray(fresh("a dog", seed=5, num_inference_steps=4, **SIZE)))


def test_the_kernel_is_free_meanwhile_and_cancel_stops(monkeypatch):
    e = explorer()
    inside, go_on = threading.Event(), threading.Event()
    watch = e.runner.watch
    def slow(step, steps):
        inside.set(), go_on.wait(20)
        watch(step, steps)
    monkeypatch.setattr(e.runner, "watch", slow)
    e.runner.go.click()
    assert inside.wait(20) and e.runner.running and e.runner.go.disabled and not e.runner.stop.disabled
    first = e.runner.thread
    e.runner.go.click()                                                     # a second press does nothing
    assert e.runner.thread is first
    before = e.image.value
    e.controls.alpha.value = 3.                                             # and the sliders go on
    assert e.image.value != before
    e.save.click()
    assert "A picture is being drawn" in e.said.value
    e.runner.stop.click()
    go_on.set()
    e.runner.wait(20)
    assert "Cancelled after 1 of 4 steps" in e.runner.said.value and e.runner.error is None and e.runner.image is None
    assert e.runner.stop.disabled and not e.runner.go.disabled
    monkeypatch.undo()
    e.runner.go.click()
    e.runner.wait(20)
    assert e.runner.image is not None and torch.equal(e.mix.plan.choice, e.plan.choice)


def test_errors_are_said_in_words():
    e = explorer()
    e.mix.pipe.scheduler, kept = None, e.mix.pipe.scheduler
    e.runner.go.click()
    e.runner.wait()
    assert e.runner.bar.bar_style == "danger" and "AttributeError: " in e.runner.said.value and not e.runner.go.disabled
    e.mix.pipe.scheduler = kept
    e.mix.remove()
    e.controls.alpha.value = 2.
    e.runner.go.click()
    e.runner.wait()
    assert "This mix has been removed" in e.runner.said.value


def test_the_first_picture_measures(monkeypatch):
    import loramix.mixing
    from loramix.probes import Discrepancy
    measured = Discrepancy(.3217, 0., (.3217,), (0,), (), "test", "a dog")
    monkeypatch.setattr(loramix.mixing, "measure_discrepancy", lambda *args, **kwargs: measured)
    e = explorer(discrepancy=None)
    assert e.standing_in and "Generate measures it" in e.controls.knobs["beta"].marks.value
    e.runner.go.click()
    e.runner.wait()
    assert e.runner.error is None and e.mix.discrepancy is measured and e.plan.rule["discrepancy"] == .3217 and not e.standing_in
    assert "measured 0.322" in e.controls.knobs["beta"].marks.value and torch.equal(e.mix.plan.choice, e.plan.choice)
    e.tray.pin.click()
    assert len(e.tray.pins[0].pictures) == 2
    other = explorer(discrepancy=None)
    other.controls.beta.value = .8                                          # given by hand: nothing is measured
    other.runner.go.click()
    other.runner.wait()
    assert other.mix.discrepancy == .8


# Keeping

def run_code(code, **names):
    exec(code, names)
    return names


@pytest.mark.parametrize("change", ["beta", "gamma", "pattern", "temperature", "klora", "topk", "direct", "switch"])
def test_the_code_makes_the_same_plan_and_picture(tmp_path, change):
    from safetensors.torch import save_file
    pipe = tiny.sd()
    files = [str(tmp_path/f"{name}.safetensors") for name in ("robot", "ink")]
    for seed, path in enumerate(files): save_file(tiny.lora_state(pipe, seed=seed), path)
    made = mix(pipe, *files, discrepancy=.4312, text_encoder="style", time="noise" if change == "beta" else "index")
    e = made.explore(prompt="it's a \"dog\"", steps=5, seed=3, **SIZE)
    SETTINGS[change](e.controls)
    e.controls.strengths[0].value = .9
    e.copy.click()
    assert e.code.layout.display is None
    e.controls.strengths[1].value = .8                                      # the code on screen follows
    e.runner.go.click()
    e.runner.wait()
    e.mix.remove()
    names = run_code(e.code.value, pipe=pipe)
    assert torch.equal(names["mix"].plan.weights, e.plan.weights) and np.array_equal(np.asarray(names["image"]), np.asarray(e.runner.image))
    bare = explore(score(*files), steps=7)
    bare.controls.put(e.controls.state if change != "beta" else bare.controls.state)
    assert torch.equal(run_code(bare.as_code())["plan"].weights, bare.plan.weights)


def test_save_recipe(tmp_path):
    from safetensors.torch import save_file
    pipe = tiny.sd()
    files = [str(tmp_path/f"{name}.safetensors") for name in ("robot", "ink")]
    for seed, path in enumerate(files): save_file(tiny.lora_state(pipe, seed=seed), path)
    e = mix(pipe, *files, discrepancy=.4312).explore(prompt="a dog", seed=2, steps=5, **SIZE)
    e.controls.alpha.value, e.path.value = 2.2, str(tmp_path/"mix.json")
    e.save.click()
    assert "Saved as" in e.said.value and json.loads((tmp_path/"mix.json").read_text())["rule"]["options"]["alpha"] == 2.2
    e.runner.go.click()
    e.runner.wait()
    e.mix.remove()
    with load(pipe, tmp_path/"mix.json") as again:
        assert torch.equal(again.plan.choice, e.plan.choice) and np.array_equal(np.asarray(again.replay()), np.asarray(e.runner.image))
    e.path.value = str(tmp_path/"nowhere"/"mix.json")
    e.save.click()
    assert "Error" in e.said.value
    plain = explore(score(*files), steps=5)
    plain.path.value = str(tmp_path/"plan.json")
    plain.save.click()
    assert torch.equal(Plan.from_json((tmp_path/"plan.json").read_text()).choice, plain.plan.choice)


def test_pins(large):
    e = explore(large, steps=8)
    for alpha in (1., 2., 3., 4.):
        e.controls.alpha.value = alpha
        e.tray.pin.click()
    e.tray.pin.click()
    assert len(e.tray.pins) == 4 and "drop one first" in e.tray.said.value
    card = e.tray.cards.children[1]
    card.children[2].children[0].click()
    assert e.controls.alpha.value == 2. and e.plan.rule["alpha"] == 2.
    card.children[2].children[1].click()
    assert [pin.state.options["alpha"] for pin in e.tray.pins] == [1., 3., 4.] and card.comm is None
    e.tray.pin.click()
    assert e.tray.pins[-1].state.options["alpha"] == 2.


def test_mixes_of_other_kinds():
    "Several LoRAs, one that always acts, a ready plan, an own rule."
    pipe = tiny.sd()
    lora = lambda seed: tiny.lora_state(pipe, seed=seed)
    with mix(pipe, [lora(1), lora(2)], lora(3), always=lora(4), discrepancy=.5, balance=[1.5, .7]) as m:
        e = m.explore(prompt="a dog", steps=4, **SIZE)
        assert len(e.controls.strengths) == 3 and e.controls.balance.value == "as given" and e.plan.rule["gamma"] == [1.5, .7]
        e.controls.alpha.value = 2.
        e.runner.go.click()
        e.runner.wait()
        assert e.runner.error is None and torch.equal(m.plan.choice[..., :3], e.plan.choice) and len(m.plan.loras) == 4
    given = klora(score(lora(1), lora(2)), 4)
    with mix(pipe, lora(1), lora(2), rule=given) as m:
        e = m.explore(prompt="a dog", **SIZE)
        assert e.plan is given and [name for name, row in e.controls.rows.items() if row.layout.display is None] == ["rule"]
        e.runner.go.click()
        e.runner.wait()
        assert e.runner.error is None and m.plan is given
        e.controls.rule.value = "est"
        e.runner.go.click()
        e.runner.wait()
        assert e.runner.error is None and m.plan.rule["name"] == "est"
    with mix(pipe, lora(1), lora(2), rule="acfg", subject_window=(0., .5)) as m:
        e = m.explore(prompt="a dog", steps=4, **SIZE)
        assert torch.equal(e.plan.choice, m.plan_for(4).choice) and e.stage.note.get_text() == "This rule compares nothing."
        e.runner.go.click()
        e.runner.wait()
        assert e.runner.error is None and torch.equal(m.plan.weights, e.plan.weights) and "subject_window=(0.0, 0.5)" in e.as_code()
    def late(scores, steps, *, strengths=None): return est(scores, steps, discrepancy=2., strengths=strengths)
    with mix(pipe, lora(1), lora(2), rule=late) as m:
        e = m.explore(prompt="a dog", steps=4, **SIZE)
        e.controls.strengths[0].value = .5
        e.runner.go.click()
        e.runner.wait()
        assert e.runner.error is None and torch.equal(m.plan.weights, e.plan.weights)


# For readers without a kernel, and for long sittings

def test_the_still_picture_shows_the_same(large):
    e = explore(large, steps=12)
    e.controls.beta.value, e.steps.slider.value = .7, 6
    bundle = e._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= bundle.keys()
    still, live = picture(e.figure_png()).astype(int), picture(e.image.value).astype(int)
    assert still.shape == live.shape and (np.abs(still - live).max(-1) > 40).mean() < .005
    e.update()
    assert np.array_equal(picture(e.image.value), live)


def test_200_moves_leave_nothing_behind(large):
    "Figures, widgets and memory after 200 moves of every slider, once warm."
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure
    e = explore(large, steps=50)
    sliders = [e.controls.beta, e.controls.alpha, e.controls.temperature, e.controls.gamma, e.controls.strengths[0], e.steps.slider, e.layers.height, e.controls.steps]
    def moves(count):
        for i in range(count):
            slider = sliders[i % len(sliders)]
            low, high = (slider.base**slider.min, slider.base**slider.max) if hasattr(slider, "base") else (slider.min, slider.max)
            value = low + (high - low)*((i*37 % 100)/100)
            slider.value = int(value) if isinstance(slider, ipywidgets.IntSlider) else value
    def figures(): return sum(issubclass(type(thing), Figure) for thing in gc.get_objects())
    def held():
        gc.collect()
        return psutil.Process().memory_info().rss, figures(), len(ipywidgets.widgets.widget._instances)
    moves(80)
    before = held()
    moves(200)
    after = held()
    assert after[0] - before[0] <= 5e6, f"grew by {(after[0] - before[0])/1e6:.1f} MB"
    assert after[1:] == before[1:] and plt.get_fignums() == []


def test_parts_work_alone(large):
    moved = []
    steps = Steps(10, lambda: moved.append("step"))
    steps.slider.value = 3
    controls = Controls(State(), large.loras, lambda: moved.append("knob"))
    controls.beta.value = .6
    assert moved == ["step", "knob"] and controls.state.beta == .6
    stage = Stage(large, 50)
    show(stage, plan_of(controls.state, large))
    assert picture(stage_png(stage)).shape[1] == stage.width
    assert len(sdxl_layers()) == 560 and loramix.Mix.explore
