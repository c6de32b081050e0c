"The page about a mix: nothing loaded from outside, nothing escapes, its numbers are the plan's, its recipe draws the same picture."
import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import tiny
from loramix import load, mix, read_lora
from loramix.diagrams import choices
from loramix.report import Report, bare_path, make_report, python_call, recipe_of, rule_words, time_ramp, turn_words
from loramix.rules import est
from loramix.scores import ratios

SIZE = dict(height=16, width=16)
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Reader(HTMLParser):
    "Collects the tags, their attributes, and the text of a page; checks that every tag is closed in order."
    EMPTY = ("meta", "img")

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name not in self.EMPTY: self.open.append(name)

    def handle_endtag(self, name): assert self.open.pop() == name
    def handle_data(self, data): self.text += data if not self.open or self.open[-1] != "style" else ""


def colours(images):
    "An encoder of the test's own: the pictures shrunk to 4 × 4 pixels."
    return torch.stack([torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).flatten() - 90 for image in images])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path/"cache"))


@pytest.fixture
def pair():
    pipe = tiny.sd()
    c, s = (read_lora(tiny.lora_state(pipe, seed=seed)) for seed in (1, 2))
    return pipe, replace(c, name="dog"), replace(s, name="ink")


def drawn(pipe, c, s, *, prompt="a dog", seed=0, **settings):
    "A mix that has drawn a picture of 6 steps."
    mixed = mix(pipe, c, s, **{"encoder": colours, "probe_seeds": (0, 1), **settings})
    mixed(prompt, seed=seed, num_inference_steps=6, **SIZE)
    return mixed


def test_nothing_is_loaded_and_every_tag_is_closed(pair, tmp_path):
    with drawn(*pair) as mixed: page = mixed.report(tmp_path/"page.html")
    text = (tmp_path/"page.html").read_text(encoding="utf-8")
    assert text == page.html and text.startswith("<!doctype html>")
    reader = Reader(text)
    assert {name for name, _ in reader.tags} <= set("html head meta title style body article section h1 h2 p q div figure img figcaption table tr th td b code pre a details summary".split())
    for name, attributes in reader.tags:
        assert not [key for key in attributes if key.startswith("on")], attributes
        for key in ("src", "href", "srcset", "action", "poster", "data"): assert attributes.get(key, "data:").startswith("data:"), (name, key)
    style = re.search("<style>(.*?)</style>", text, re.S).group(1)
    assert not re.search(r"url\(|@import|expression|https?:", style) and "prefers-color-scheme: dark" in style
    assert not re.search(r"https?://", re.sub(r"data:[\w/+;=-]+,[A-Za-z0-9+/=]+", "", text))
    policy = next(attributes["content"] for name, attributes in reader.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    images = [attributes for name, attributes in reader.tags if name == "img"]
    assert len(images) == 9 and all(attributes["alt"] for attributes in images)
    for attributes in images: assert base64.b64decode(attributes["src"].partition(",")[2])[:4] == b"\x89PNG"


def test_hostile_names_prompts_and_metadata_stay_text(pair, tmp_path):
    pipe, c, s = pair
    c = replace(c, name=HOSTILE, metadata={"modelspec.license": HOSTILE, "modelspec.trigger_phrase": f"dog {HOSTILE}"}, source=f"/home/me/{HOSTILE}")
    with drawn(pipe, c, s, prompt=f"dog {HOSTILE}") as mixed: page, shown = mixed.report(title=None), mixed.report(title=HOSTILE)
    for one in (page.html, shown.html, page._repr_html_()):
        reader = Reader(one)
        assert "script" not in {name for name, _ in reader.tags} and not [a for _, a in reader.tags if "onerror" in a]
        assert "<script" not in one and "<img src=x" not in one
        assert HOSTILE in reader.text                                                   # and is still to be read, as text
    assert recipe_of(page)["call"]["prompt"] == f"dog {HOSTILE}"


def test_its_numbers_are_the_plans(pair):
    with drawn(*pair) as mixed:
        page, plan, beta = mixed.report(), mixed.plan, mixed.discrepancy
    text = Reader(page.html).text
    assert mixed.explain().replace(" %", "\u00a0%") in text
    assert f"β = {beta.value:.3f}, over 2 seeds, with a spread of {beta.spread:.3f}" in text and beta.encoder in text
    assert f"γ = {plan.rule['gamma'][0]:.3g}" in text and f"{time_ramp(plan)[0]:.2f} at the first step and {time_ramp(plan)[-1]:.2f} at the last" in text
    assert f"6 steps, {len(plan.layers)} layers" in text and all(lora.sha256 in text for lora in mixed.loras)
    numbers, at = ratios(mixed.scores, plan.rule["gamma"]), time_ramp(plan)
    assert (choices(numbers, at).T == plan.choice[..., 0].bool().numpy()).all()
    said = turn_words(numbers, at, mixed.scores.layers)
    if said:
        step = int(re.search(r"at step (\d+) ", said).group(1))
        turned = plan.choice[:, :, 0].bool().numpy()
        assert said in text and (turned[step - 1] & ~turned[step]).any()
    assert page.recipe["plan"] == mixed.recipe()["plan"] and recipe_of(page) == page.recipe


@pytest.mark.parametrize("settings", [dict(), dict(alpha=.4, pattern="s*"), dict(temperature=.3), dict(balance="none"), dict(rule="klora"), dict(rule="klora", pattern="s*"), dict(parity="official")], ids=str)
def test_the_ramp_of_the_page_gives_the_plan(pair, settings):
    pipe, c, s = pair
    with mix(pipe, c, s, discrepancy=.5, **settings) as mixed:
        mixed("a dog", seed=0, num_inference_steps=6, **SIZE)
        page, plan = mixed.report(), mixed.plan
        table = mixed.scores.top_sum if settings.get("rule") == "klora" else None
        if settings.get("parity"): assert "Why a layer turns" not in page.html
        else:
            winner = plan.choice[..., 0] > plan.choice[..., 1]
            assert (choices(ratios(mixed.scores, plan.rule["gamma"], table), time_ramp(plan)).T == winner.numpy()).all()
            assert "Why a layer turns" in page.html


@pytest.mark.parametrize("rule", ["topk", "direct", "switch"])
def test_rules_without_a_ramp_have_no_crossing(pair, rule):
    with drawn(*pair, rule=rule) as mixed: page = mixed.report()
    assert "Why a layer turns" not in page.html and "How far apart" not in page.html and rule_words(mixed.plan) in Reader(page.html).text


def test_ready_plans_several_loras_and_always_ones(pair):
    pipe, c, s = pair
    more = replace(read_lora(tiny.lora_state(pipe, seed=3)), name="fast")
    with mix(pipe, [c, more], s, discrepancy=.4, always=replace(more, name="lcm"), always_strengths=.5) as mixed:
        mixed(["a dog", "a cat"], seed=0, num_inference_steps=3, **SIZE)
        text = Reader(mixed.report().html).text
    assert "picture 2" in text and "lcm" in text and "0.5" in text and "β = 0.4 was given by hand" in text
    plan = est(mixed.scores, 4, discrepancy=.2)
    with mix(pipe, [c, more], s, rule=plan) as mixed:
        page = mixed.report()
    assert "has drawn no picture here yet" in page.html and "rule='plan'" in Reader(page.html).text


@pytest.mark.parametrize("rule", ["est", "soft"])
def test_the_call_is_exact(pair, rule):
    "The code on the page, run with the names it cannot know, draws the same picture."
    pipe, c, s = pair
    with drawn(pipe, c, s, rule=rule, alpha=1.2, strengths=(1., .8), seed=4) as mixed:
        image, code = mixed.pictures[0], python_call(mixed, mixed.plan)
    lines = code.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("mix = loramix.mix("))
    body = "\n".join(lines[start:]).replace("'<dog, from memory>'", "c").replace("'<ink, from memory>'", "s")
    import loramix
    names = dict(loramix=loramix, pipe=pipe, c=c, s=s)
    exec(body, names)
    names["mix"].remove()
    assert (np.asarray(names["image"]) == np.asarray(image)).all()
    assert "from diffusers import StableDiffusionPipeline" in code


def test_the_recipe_on_the_page_draws_the_picture(tmp_path):
    from safetensors.torch import save_file
    pipe = tiny.sd()
    for name, seed in (("dog", 1), ("ink", 2)): save_file(tiny.lora_state(pipe, seed=seed), tmp_path/f"{name}.safetensors")
    with drawn(pipe, tmp_path/"dog.safetensors", tmp_path/"ink.safetensors") as mixed:
        image, page = mixed.pictures[0], mixed.report(tmp_path/"page.html", folders=False)
    assert str(tmp_path) not in page.html and str(tmp_path) not in json.dumps(recipe_of(page))
    assert str(tmp_path) in json.dumps(recipe_of(make_report(mixed, folders=True)))
    (tmp_path/"recipe.json").write_text(json.dumps(recipe_of(tmp_path/"page.html")))
    with load(pipe, tmp_path/"recipe.json") as again: assert (np.asarray(again.replay()) == np.asarray(image)).all()
    (tmp_path/"empty.html").write_text("<p>nothing")
    with pytest.raises(ValueError, match="no loramix recipe"): recipe_of(tmp_path/"empty.html")


def test_a_mix_that_waits_says_how_to_go_on(pair):
    pipe, c, s = pair
    with mix(pipe, c, s, encoder=colours) as mixed:
        with pytest.raises(RuntimeError, match="not known yet"): mixed.report()


def test_a_notebook_shows_the_page_without_touching_it(pair):
    with drawn(*pair) as mixed: page = mixed.report()
    assert isinstance(page, Report) and "kB of HTML" in repr(page)
    rules = re.search("<style>(.*?)</style>", page._repr_html_(), re.S).group(1)
    selectors = [selector.strip() for block in re.findall(r"([^{}]+)\{", rules) for selector in block.split(",") if not block.strip().startswith("@")]
    assert selectors and all(selector.startswith(".loramix-report") for selector in selectors), selectors


def test_paths():
    assert bare_path("/a/b/dog.safetensors") == "dog.safetensors" and bare_path("C:\\a\\dog.safetensors") == "dog.safetensors"
    assert bare_path("user/dog") == "user/dog" and bare_path(None) is None and bare_path("/") == "/"
