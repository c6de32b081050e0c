"The small world as it ships: complete, readable, and its judge sees what is there."
import sys
from pathlib import Path

import pytest
import torch

import loramix
from loramix.lora import read_lora
from loramix.probes import find_encoder
from loramix.rules import direct
from loramix.scores import score

sys.path.insert(0, str(Path(__file__).parent.parent/"benchmarks"))


@pytest.fixture(scope="module")
def world():
    demo = loramix.demo()
    demo.pipe.set_progress_bar_config(disable=True)
    return demo


@pytest.fixture(scope="module")
def judge(world):
    from first_table import Judge
    return Judge(world)


def test_it_is_a_real_pipeline(world):
    from diffusers import StableDiffusionPipeline
    assert type(world.pipe) is StableDiffusionPipeline
    assert all(torch.isfinite(p).all() for part in (world.pipe.unet, world.pipe.vae, world.pipe.text_encoder) for p in part.parameters())


def test_the_shelf_is_complete(world):
    assert len(world.subjects) >= 12 and len(world.styles) >= 8
    assert not set(world.subjects) & set(world.world["known_subjects"]) and not set(world.styles) & set(world.world["known_styles"])
    assert {(p["subject"], p["style"]) for p in world.pairs} == {(c, s) for c in world.subjects for s in world.styles}
    for pair in world.pairs: assert world.truth(pair["subject"], pair["style"]).size == (64, 64)


def test_the_split_keeps_tuning_and_judging_apart(world):
    half = {kind: {name: facts["half"] for name, facts in world.world[f"{kind}s"].items()} for kind in ("subject", "style")}
    for pair in world.pairs:
        halves = {half["subject"][pair["subject"]], half["style"][pair["style"]]}
        assert pair["split"] == (halves.pop() if len(halves) == 1 else "mixed")
    for kind in half: assert abs(list(half[kind].values()).count("tuning") - len(half[kind])/2) <= .5


def test_every_lora_fits_the_pipeline_and_differs(world):
    modules = dict(world.pipe.unet.named_modules())
    seen, ranks = set(), set()
    for path in (*world.subjects.values(), *world.styles.values()):
        lora = read_lora(path)
        assert not lora.report.unused and not lora.text_encoders and lora.sha256 not in seen
        seen.add(lora.sha256)
        ranks |= {update.rank for update in lora.denoiser.values()}
        for name, update in lora.denoiser.items(): assert tuple(modules[name.removeprefix("unet.")].weight.shape) == tuple(update.shape)
    assert len(ranks) > 1        # a real shelf is uneven


def test_our_scales_are_those_that_diffusers_loads(world):
    "Sum of two files at our scales against diffusers' own loading of both: the latents agree."
    c, s = list(world.subjects)[0], list(world.styles)[0]
    run = dict(prompt=world.prompt(c, s), output_type="latent", **world.run)
    with loramix.mix(world.pipe, world.subjects[c], world.styles[s], rule="direct"):
        ours = world.pipe(generator=torch.Generator().manual_seed(0), **run).images
    for name, file in (("c", world.subjects[c]), ("s", world.styles[s])): world.pipe.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name, adapter_name=name)
    world.pipe.set_adapters(["c", "s"], [1., 1.])
    try: theirs = world.pipe(generator=torch.Generator().manual_seed(0), **run).images
    finally: world.pipe.unload_lora_weights()
    assert ((ours - theirs).norm()/theirs.norm()).item() <= 1e-3


def test_the_judge_knows_the_true_pictures(world, judge):
    right = {"subject": 0, "style": 0}
    for pair in world.pairs:
        seen = judge([world.truth(pair["subject"], pair["style"])])
        for kind in right: right[kind] += judge.words[kind][seen[kind][0].argmax()] == world.world[f"{kind}s"][pair[kind]]["word"]
    assert {kind: count/len(world.pairs) for kind, count in right.items()} == {kind: pytest.approx(1, abs=.06) for kind in right}


def test_probe_encoder_is_the_pipelines_own_and_not_the_judge(world):
    encoder = find_encoder(None, world.pipe)
    assert "probe_encoder" in encoder.name
    weights = [(world.folder/world.world[name]/"open_clip_model.safetensors").read_bytes() for name in ("probe_encoder", "judge")]
    assert weights[0] != weights[1]
    a, b = encoder.embed([world.truth(*pair) for pair in (("robot", "line"), ("peach", "line"))])
    assert not torch.allclose(a, b)


def test_a_subject_lora_draws_its_subject_and_a_style_lora_its_style(world, judge):
    "Eight pictures each: the full count with its floors stands in training/floors.md."
    from first_table import draw
    from loramix.fusion import fuse
    from loramix.probes import side_plan
    def share(kind, file, prompt, word):
        lora = read_lora(file)
        with fuse(world.pipe, side_plan([lora], kind), [lora]): images = draw(world, prompt, range(8))
        return sum(judge.words[kind][row.argmax()] == word for row in judge(images)[kind])/8
    assert share("subject", world.subjects["robot"], world.prompt("robot"), world.world["subjects"]["robot"]["word"]) >= .75
    assert share("style", world.styles["line"], world.world["prompt"].format(subject="penguin", style=world.world["styles"]["line"]["phrase"]), world.world["styles"]["line"]["word"]) >= .75


def test_scores_of_a_shelf_pair_cover_every_attention_layer(world):
    scores = score(world.subjects["robot"], world.styles["line"])
    assert scores.present.all() and (scores.energy > 0).all()
    assert direct(scores, 1).choice.sum() == 2*len(scores.layers)
