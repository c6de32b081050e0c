"Metrics against formulas written out and against scipy; intervals against a closed form."
import numpy as np
import pytest
import torch
from scipy import stats

import loramix
from loramix import evaluate
from loramix.evaluate import Case, Metric, bootstrap, both_metric, compare, harmonic, holm, judge, probe, resample_weights, world_words, zero_shot


@pytest.fixture(scope="module")
def world():
    demo = loramix.demo()
    demo.pipe.set_progress_bar_config(disable=True)
    return demo


def cross(subjects=7, styles=5, seeds=1):
    "Labels of a full cross, row by row."
    return tuple(np.repeat(x.ravel(), seeds) for x in np.meshgrid(range(subjects), range(styles), indexing="ij"))


def test_zero_shot_is_open_clips_own(world):
    "The same numbers as open_clip's model gives when it is called by hand."
    import open_clip
    folder, words = f"local-dir:{world.folder/world.world['judge']}", world_words(world)
    model, preprocess = open_clip.create_model_from_pretrained(folder, return_transform=True)
    images = [world.truth("robot", "line"), world.truth("swan", "night")]
    with torch.no_grad():
        scale = model.eval().logit_scale.exp()
        seen = model.encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(folder)(list(words.subject_texts)), normalize=True)
    assert torch.allclose(zero_shot(judge(world), images, words.subject_texts), (scale*seen @ text.T).softmax(1), atol=1e-6)


def test_p_both_is_the_product_and_both_is_both(world):
    cases = [Case(p["subject"], p["style"]) for p in world.pairs[:20]]
    found = both_metric(world)([world.truth(c.subject, c.style) for c in cases], cases)
    assert np.allclose(found["p_both"], np.multiply(found["p_subject"], found["p_style"]))
    assert np.allclose(found["harmonic"], stats.hmean([found["p_subject"], found["p_style"]]))
    assert found["both"] == [a*b for a, b in zip(found["right_subject"], found["right_style"])]
    swapped = both_metric(world)([world.truth("robot", "line")], [Case("swan", "night")])
    assert swapped["both"] == [0.] and swapped["p_both"][0] < .1


def test_roles_are_kept_apart(world):
    assert judge(world).role == "judge" and probe(world).role == "tune" and judge(world).key != probe(world).key
    assert both_metric(world).role == "judge" and evaluate.fidelity_metric(world, judge(world)).role == "judge"
    assert evaluate.truth_metric(world).role == "tune"
    with pytest.raises(ValueError, match="role"): Metric("m", "both", lambda images, cases: {}, "m")


def test_two_way_variance_has_its_closed_form():
    "E[w_i w_k] = 1 − 1/R + δ_ik for multinomial counts, for subjects and for styles."
    rng = np.random.default_rng(3)
    table = rng.normal(size=(6, 1)) + rng.normal(size=(1, 4)) + rng.normal(size=(6, 4))
    R, C = table.shape
    second = sum(table[i, j]*table[k, m]*((i == k) + 1 - 1/R)*((j == m) + 1 - 1/C) for i in range(R) for j in range(C) for k in range(R) for m in range(C))/(R*C)**2
    drawn = resample_weights(*cross(R, C), 100_000, 1) @ table.ravel()
    assert drawn.var() == pytest.approx(second - table.mean()**2, rel=.03) and drawn.mean() == pytest.approx(table.mean(), abs=.02)


def test_one_way_is_scipys():
    x = np.random.default_rng(4).gamma(2., size=40)
    level = 1 - 2*stats.norm.cdf(np.sqrt(40/39)*stats.t.ppf(.025, 39))      # Hesterberg's expanded percentiles
    want = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=20_000, confidence_level=level, rng=np.random.default_rng(5)).confidence_interval
    for labels in ((range(40), [0]*40), ([0]*40, range(40))):
        found = bootstrap(x, *labels, draws=20_000)
        assert (found.low, found.high) == pytest.approx((want.low, want.high), rel=.02) and found.value == pytest.approx(x.mean())


def test_intervals_are_seeded_and_clustered():
    s, t = cross(seeds=8)
    y = np.repeat(np.random.default_rng(6).normal(size=7), 40)             # only subjects differ
    assert bootstrap(y, s, t) == bootstrap(y, s, t)
    naive = bootstrap(y, range(len(y)), [0]*len(y))
    found = bootstrap(y, s, t)
    assert found.high - found.low > 3*(naive.high - naive.low)


@pytest.mark.parametrize("subject, style", [(0, 0), (.7, .7), (0, 1), (1, 0)])
def test_intervals_cover(subject, style):
    "The true mean lies in 95 % intervals of seven subjects and five styles in at least 92 % of 300 simulated worlds, whichever of the two differ."
    rng, (s, t), hit = np.random.default_rng(9), cross(), 0
    for _ in range(300):
        found = bootstrap(subject*rng.normal(size=7)[s] + style*rng.normal(size=5)[t] + .7*rng.normal(size=35), s, t, draws=800)
        hit += found.low <= 0 <= found.high
    assert hit/300 >= .92


def test_p_and_interval_agree():
    "p is under .05 where the 95 % interval leaves zero out, but for close calls; with one cluster a row it is Student's."
    rng, (s, t) = np.random.default_rng(10), cross()
    seen = [compare(shift + .5*rng.normal(size=7)[s] + rng.normal(size=35), np.zeros(35), s, t) for shift in np.linspace(-1.5, 1.5, 60)]
    assert all((i.p < .05) == i.excludes_zero for i in seen if abs(i.p - .05) > .02) and {i.excludes_zero for i in seen} == {True, False}
    y = rng.normal(.3, 1, size=25)
    assert compare(y, np.zeros(25), range(25), [0]*25, draws=40_000).p == pytest.approx(stats.ttest_1samp(y, 0).pvalue, rel=.08)


def test_statistic_of_means():
    s, t = cross()
    y = np.random.default_rng(7).random((35, 2))
    found = bootstrap(y, s, t, statistic=lambda m: harmonic(m[..., 0], m[..., 1]))
    assert found.value == pytest.approx(stats.hmean(y.mean(0))) and found.low < found.value < found.high


def test_a_sparse_design_works():
    "Three pairs that share nothing: many draws miss them all."
    found = bootstrap([0., 1., 2.], ["a", "b", "c"], ["x", "y", "z"])
    assert 0 <= found.low < 1 < found.high <= 2


def test_paired_beats_unpaired_and_p_is_honest():
    s, t = cross(seeds=2)
    rng = np.random.default_rng(8)
    hard = np.repeat(rng.normal(size=35), 2)
    a, b = hard + .2 + .1*rng.normal(size=70), hard + .1*rng.normal(size=70)
    found = compare(a, b, s, t)
    assert found.excludes_zero and found.p < .01 and found.value == pytest.approx((a - b).mean())
    assert compare(b, a, s, t).value == -found.value
    assert not compare(hard, hard[::-1], s, t).p < .01
    false = sum(compare(*rng.normal(size=(2, 70)), s, t, draws=300).excludes_zero for _ in range(200))/200
    assert false <= .05


def test_holm_against_the_definition():
    p = np.array([.001, .2, .04, .03, .9])
    rising, running, want = np.argsort(p), 0., np.empty(5)
    for rank, i in enumerate(rising):
        running = max(running, min(1., p[i]*(5 - rank)))
        want[i] = running
    assert np.allclose(holm(p), want)


def test_similarity_is_all_pairs(world):
    a, b = [world.truth("robot", s) for s in list(world.styles)[:3]], [world.truth("crab", s) for s in list(world.styles)[:4]]
    e = probe(world)
    pairs = [torch.nn.functional.cosine_similarity(e.embed([x]), e.embed([y])).item() for x in a for y in b]
    assert evaluate.similarity(e, a, b).mean().item() == pytest.approx(np.mean(pairs), abs=1e-5)


def test_gram_forgets_places_and_tells_styles_apart(world):
    "The nearest style by Gram matrix, of drawings of subjects that are not among the references."
    e, names = judge(world), list(world.subjects)
    right = 0
    for style in world.styles:
        image = world.truth(names[0], style)
        distances = {other: evaluate.gram_distance(e, [image], [world.truth(n, other) for n in names[1:]]).item() for other in world.styles}
        right += min(distances, key=distances.get) == style
    assert right >= .7*len(world.styles)


def test_distance_to_the_truth(world):
    from PIL import ImageChops
    metric, truth = evaluate.truth_metric(world), world.truth("rocket", "line")
    moved = ImageChops.offset(truth, 3, -2)
    found = metric([truth, moved, world.truth("peach", "line")], [Case("rocket", "line")]*3)
    assert found["psnr"][:2] == [99., 99.] and found["psnr"][2] < 20 and found["ssim"][0] == pytest.approx(1, abs=1e-4) and found["ssim"][2] < .8
    assert found["perceptual"][0] == pytest.approx(0, abs=1e-5) and found["perceptual"][2] > found["perceptual"][1]
    assert np.isnan(metric([truth], [Case("rocket", "nowhere")])["psnr"][0])


def test_psnr_against_the_formula(world):
    a, b = evaluate.pixels([world.truth("rocket", "line"), world.truth("rocket", "night")])
    want = -10*torch.log10((evaluate.registered(a, b) - b).square().mean()).item()
    assert evaluate.truth_metric(world)([world.truth("rocket", "line")], [Case("rocket", "night")])["psnr"][0] == pytest.approx(want, abs=1e-3)


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="weights named"): evaluate.dual_encoder("ViT-B-32")
    with pytest.raises((RuntimeError, FileNotFoundError), match="cannot be loaded|no such"): evaluate.dual_encoder(f"local-dir:{tmp_path}")
