"Scores and rules against things loramix did not write: the authors' own selections and dense float64 products."
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from loramix.lora import read_lora
from loramix.rules import est, klora
from loramix.scores import balance, score

DATA = os.environ.get("LORAMIX_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LORAMIX_TEST_DATA is not set: the golden selections and real LoRA files are not there")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    "A cache folder of the test's own."
    old, os.environ["LORAMIX_CACHE"] = os.environ.get("LORAMIX_CACHE"), str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None: del os.environ["LORAMIX_CACHE"]
    else: os.environ["LORAMIX_CACHE"] = old


def golden():
    "The authors' selections, one parameter for each run of each pair."
    if not DATA: return []
    pairs = json.loads((Path(DATA)/"golden/selections.json").read_text())
    return [pytest.param(pair, run, id=f"{i}-{run['rule']}-{run['pattern']}-{run['beta']}") for i, pair in enumerate(pairs) for run in pair["runs"]]


def pair_scores(pair):
    "Our scores of a golden pair."
    file = lambda stem: Path(DATA)/"loras"/f"{stem}.safetensors"
    return score(file(pair["subject"]), file(pair["style"]))


def official_plan(scores, run):
    "Our plan with the settings of a golden run."
    settings = dict(steps=run["steps"], alpha=run["alpha"], pattern=run["pattern"], parity="official")
    return est(scores, discrepancy=run["beta"], **settings) if run["rule"] == "est" else klora(scores, beta=run["beta"], **settings)


@needs_data
@pytest.mark.parametrize("pair,run", golden())
def test_golden_selection(pair, run):
    scores = pair_scores(pair)
    assert [layer.removeprefix("unet.") for layer in scores.layers] == pair["names"]
    ours = official_plan(scores, run).choice[..., 0].numpy().astype(bool)
    theirs = np.array([[c == "S" for c in row] for row in run["rows"]])
    assert ours.shape == theirs.shape == (run["steps"], 128)
    assert (ours == theirs).sum() == theirs.size


@needs_data
def test_golden_numbers():
    "Their energies are float32 norms squared, which differ from float64 ones by up to 1e-4; γ is compared as they print it."
    for pair in json.loads((Path(DATA)/"golden/selections.json").read_text()):
        seen = pair_scores(pair).without_scale()
        np.testing.assert_allclose(seen.energy[:, 0], pair["energy_subject"], rtol=2e-4)
        np.testing.assert_allclose(seen.energy[:, 1], pair["energy_style"], rtol=2e-4)
        assert balance(seen, "official")[0] == pytest.approx(pair["gamma"], rel=1e-5)


@needs_data
@pytest.mark.parametrize("strength", [.25, .5, 2., 4.])
def test_strength_leaves_the_energy_choice_alone(strength):
    from dataclasses import replace
    pair = json.loads((Path(DATA)/"golden/selections.json").read_text())[0]
    scores = pair_scores(pair)
    subject, style = scores.files
    loud = lambda lora: replace(lora, layers={n: replace(u, scale=u.scale*strength) for n, u in lora.layers.items()})
    for pattern in ("s", "s*"):
        plain = est(scores, 20, discrepancy=.4, pattern=pattern).choice
        assert torch.equal(est(score(loud(subject), style), 20, discrepancy=.4, pattern=pattern).choice, plain)
        assert torch.equal(est(score(subject, loud(style)), 20, discrepancy=.4, pattern=pattern).choice, plain)
        assert torch.equal(est(scores, 20, discrepancy=.4, pattern=pattern, strengths=(strength, 1.)).choice, plain)


def random_pair(layers, out=64, width=48, ranks=(4, 8), seed=0):
    "Two random LoRAs with the same layers."
    g = torch.Generator().manual_seed(seed)
    make = lambda r: read_lora({f"unet.layer{i}.to_q.lora_{m}.weight": torch.randn(*shape, generator=g)
                                for i in range(layers) for m, shape in (("A", (r, width)), ("B", (out, r)))})
    return make(ranks[0]), make(ranks[1])


def test_scores_against_dense_float64():
    pair = random_pair(6)
    scores = score(*pair)
    for column, lora in enumerate(pair):
        for row, layer in enumerate(scores.layers):
            update = lora.layers[layer]
            dense = update.up.double() @ update.down.double()*update.scale
            assert scores.energy[row, column] == pytest.approx(dense.square().sum().item(), rel=1e-6)
            assert scores.abs_sum[row, column] == pytest.approx(dense.abs().sum().item(), rel=1e-5)
            assert scores.top_sum[row, column] == pytest.approx(dense.abs().flatten().topk(32).values.sum().item(), rel=1e-5)


def test_cache_is_by_content_and_survives_damage(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path))
    pair = random_pair(3, seed=1)
    first = score(*pair).abs_sum
    for path in (tmp_path/"scores").iterdir(): path.write_text("{ half a fi")
    np.testing.assert_array_equal(score(*pair).abs_sum, first)
    other = random_pair(3, seed=2)
    assert not np.allclose(score(*other).abs_sum, first)


def test_unwritable_cache_is_logged_not_fatal(tmp_path, monkeypatch, caplog):
    (tmp_path/"file").write_text("in the way")
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path/"file"))
    assert score(*random_pair(2, seed=3)).abs_sum.shape == (2, 2)
    assert "cannot be" in caplog.text
