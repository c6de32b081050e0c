"""Drawing on real layer names and at real sizes: orders, speed, no figure left behind, errors that state both shapes."""
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loramix import drawing
from loramix.diagrams import crossing, energy_blocks, energy_map, overlap_map, probe_sheet, shares, spectra
from loramix.drawing import (BOTH, NEITHER, STYLE, SUBJECT, cell_colours, contact_sheet, figure_png, lay_rows,
                             layer_blocks, layer_order, layer_place, plan_map, repaint, rgb, strip)

LORAS = ["dog", "watercolour"]


def attention(prefix, depth):
    "The 8 attention linears of each of `depth` transformer blocks, in the order of the model."
    return [f"{prefix}.transformer_blocks.{d}.attn{a}.to_{role}" for d in range(depth) for a in (1, 2) for role in ("q", "k", "v", "out.0")]


def sdxl_names():
    "The 560 attention linears of SDXL in the order of `named_modules`, where the middle comes after the way up."
    depths = {"down_blocks.1": [2, 2], "down_blocks.2": [10, 10], "up_blocks.0": [10, 10, 10], "up_blocks.1": [2, 2, 2], "mid_block": [10]}
    return [name for block, each in depths.items() for i, depth in enumerate(each) for name in attention(f"unet.{block}.attentions.{i}", depth)]


def flux_names():
    "The 494 block linears of FLUX in the order of `named_modules`."
    double = ["norm1.linear", "norm1_context.linear", *(f"attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "add_q_proj", "to_add_out")),
              "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    single = ["norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"]
    return ([f"transformer.transformer_blocks.{i}.{x}" for i in range(19) for x in double]
            + [f"transformer.single_transformer_blocks.{i}.{x}" for i in range(38) for x in single])


def one_hot(steps, layers):
    style = np.arange(steps)[:, None] / max(steps - 1, 1) > np.linspace(.1, 1.1, layers)
    return np.stack([~style, style], -1).astype(float)


def texts(fig): return [text.get_text() for text in fig.texts]


@pytest.fixture
def golden():
    folder = os.environ.get("LORAMIX_TEST_DATA")
    path = Path(folder or "") / "golden" / "selections.json"
    if not folder or not path.exists(): pytest.skip("set LORAMIX_TEST_DATA to the folder that holds golden/selections.json")
    return json.loads(path.read_text())


def test_sdxl_flows_down_middle_up():
    names = sdxl_names()
    assert len(names) == 560
    blocks = [(run.label, run.stop - run.start) for run in layer_blocks(names)]
    assert blocks == [("down 1", 32), ("down 2", 160), ("mid", 80), ("up 0", 240), ("up 1", 48)]
    inside = [names[i] for i in layer_order(names)][32:192]
    assert inside == [name for name in names if ".down_blocks.2." in name]          # 10 transformer blocks, by number, not by letter


def test_order_is_that_of_a_shuffled_or_sorted_file():
    for names in (sdxl_names(), flux_names()):
        expected = [names[i] for i in layer_order(names)]
        for other in (sorted(names), list(np.random.default_rng(0).permutation(names))):
            assert [other[i] for i in layer_order(other)] == expected


def test_flux_flows_double_then_single():
    names = flux_names()
    assert len(names) == 494
    assert [run.label for run in layer_blocks(names)] == [f"double {i}" for i in range(19)] + [f"single {i}" for i in range(38)]
    ordered = [names[i] for i in layer_order(names)]
    assert [layer_place(name).role for name in ordered[-6:]] == ["linear", "q", "k", "v", "mlp in", "proj out"]
    assert [layer_place(name).role for name in ordered[2:10]] == ["q", "k", "v", "add q", "add k", "add v", "out", "add out"]


def test_golden_names(golden):
    for pair in golden:
        names = pair["names"]
        assert [run.label for run in layer_blocks(names)] == ["down 0", "down 1", "down 2", "mid", "up 1", "up 2", "up 3"]
        assert [run.stop - run.start for run in layer_blocks(names)] == [16, 16, 16, 8, 24, 24, 24]
        first = [layer_place(names[i]) for i in layer_order(names)][:8]
        assert [place.role for place in first] == ["q", "k", "v", "out"]*2 and [place.part for place in first] == ["attn1"]*4 + ["attn2"]*4
        assert layer_order(names) == layer_order([f"unet.{name}" for name in names])


def test_golden_selection_is_drawn_cell_by_cell(golden):
    pair = golden[0]
    rows = pair["runs"][0]["rows"]
    style = np.array([[letter == "s" for letter in row] for row in rows], dtype=float)
    fig = plan_map(np.stack([1 - style, style], -1), pair["names"], [pair["subject"], pair["style"]])
    drawn = np.concatenate([image.get_array() for image in fig.axes[0].images])
    assert drawn.shape == (128, len(rows), 3)
    for row, layer in enumerate(layer_order(pair["names"])):
        assert np.allclose(drawn[row], [rgb(STYLE) if rows[i][layer] == "s" else rgb(SUBJECT) for i in range(len(rows))])


def test_places_of_other_parts():
    assert layer_place("text_encoder.text_model.encoder.layers.3.mlp.fc2") == ("text encoder", "layer 3", 0, "ff", "out")
    assert layer_place("unet.time_embedding.linear_1").block == "in"
    assert layer_place("unet.conv_out").block == layer_place("transformer.norm_out.linear").block == "out"
    assert layer_place("unet.up_blocks.0.upsamplers.0.conv")[:2] == ("up 0", "upsampler")
    names = ["unet.conv_in", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.1.mlp.fc1"]
    assert layer_order(names) == [2, 1, 0]


def test_rows_are_whole_pixels_and_labels_do_not_touch():
    for names in (sdxl_names(), flux_names(), sdxl_names()[:80], flux_names()[:40], ["a"], ["unet.conv_in", "unet.conv_out"]):
        rows = lay_rows(names)
        assert rows.height >= 1 and isinstance(rows.height, int) and (np.diff(rows.top) >= rows.height).all()
        assert sorted(rows.order) == list(range(len(names)))
        for column in rows.columns[1:]:
            middles = [(first + last)/2 for _, first, last in column]
            assert (np.diff(middles) >= drawing.LINE).all()
    assert [label for label, *_ in lay_rows(flux_names()).columns[0]] == ["double", "single"]
    assert lay_rows(sdxl_names()).height == 1 and lay_rows(sdxl_names()[:80]).height == 8


def test_pixels_of_the_png_are_the_cells():
    names, weights = sdxl_names(), one_hot(50, 560)
    fig = plan_map(weights, names, LORAS)
    fig.flat = False                                                               # exact colours, no palette
    page = np.asarray(Image.open(io.BytesIO(figure_png(fig))).convert("RGB")).astype(int)
    box = fig.axes[0].get_window_extent()
    left, top = round(box.x0), page.shape[0] - round(box.y1)
    each = round(box.width) // 50
    for row in (0, 31, 32, 300, 559):
        for step in (0, 20, 49):
            share = weights[step, fig.rows.order[row], 1]
            wanted = cell_colours(1 - share, share)*255
            pixel = page[top + int(fig.rows.top[row]), left + each*step + each//2]
            assert np.abs(pixel - wanted).max() <= 1.5, (row, step, pixel, wanted)


def test_a_large_map_is_drawn_in_under_a_second():
    names, weights = sdxl_names(), one_hot(50, 560)
    plan_map(weights, names, LORAS)                                                # fonts are read once; then processor time, since other work may share the machine
    times = []
    for _ in range(3):
        start = time.process_time()
        png = figure_png(plan_map(weights, names, LORAS, title="560 layers, 50 steps"))
        times.append(time.process_time() - start)
    assert png[:4] == b"\x89PNG" and len(png) < 60_000
    assert min(times) < 1, times


def test_repainting_changes_the_png_and_back():
    names, weights = sdxl_names(), one_hot(50, 560)
    fig = plan_map(weights, names, LORAS)
    before = figure_png(fig)
    repaint(fig, weights[:, :, ::-1], step=49)
    assert figure_png(fig) != before
    repaint(fig, weights)
    assert figure_png(fig) == before


def test_nothing_is_registered_in_pyplot_and_settings_stay():
    code = """
import sys, numpy as np
from loramix.diagrams import *
from loramix.drawing import *
assert "matplotlib.pyplot" not in sys.modules and "torch" not in sys.modules
import matplotlib
matplotlib.rcParams["text.color"] = "#ffffff"; matplotlib.rcParams["font.size"] = 3.
names, w = [f"unet.down_blocks.{i}.attn1.to_q" for i in range(8)], np.full((4, 8, 2), .5)
figures = []
for i in range(10):
    figures += [plan_map(w, names, "ab"), shares(w, "ab"), energy_map(w[0], names, "ab", gamma=2), crossing(w[0, :, 0], w[:, 0, 0], np.arange(4)/3, names), strip([np.zeros((8, 8))])]
assert len(figures) == 50 and all(figure_png(f)[:4] == b"\\x89PNG" for f in figures[:5])
assert matplotlib.rcParams["text.color"] == "#ffffff" and matplotlib.rcParams["font.size"] == 3.
assert all(t.get_color() == INK and t.get_fontsize() >= 8 for f in figures[:9] for t in f.texts)
assert all(t.get_color() == INK and t.get_fontsize() >= 8 for f in figures[:9] for a in f.axes for t in [*a.get_xticklabels(), *a.get_yticklabels(), a.xaxis.label, a.yaxis.label] if t.get_text())
import matplotlib.pyplot
assert matplotlib.pyplot.get_fignums() == []
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    assert done.returncode == 0, done.stderr


def test_figures_are_the_same_bytes_twice_and_show_themselves():
    def draw(): return plan_map(one_hot(20, 80), sdxl_names()[:80], LORAS, title="twice")
    assert figure_png(draw()) == figure_png(draw()) == draw()._repr_png_()
    assert figure_png(draw(), dpi=50) != figure_png(draw())


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 1000])
def test_any_number_of_steps(steps):
    fig = plan_map(one_hot(steps, 80), sdxl_names()[:80], LORAS)
    ticks = [int(text.get_text()) for text in fig.axes[0].get_xticklabels()]
    assert ticks[0] == 0 and ticks[-1] == steps - 1 and len(ticks) <= 24
    assert fig.get_size_inches()[0]*100 <= 860
    assert len(shares(one_hot(steps, 80), LORAS).axes) == 1


def test_no_text_leaves_the_page():
    names = sdxl_names()
    long = ["x"*90, "y z "*30]
    rng = np.random.default_rng(0)
    progress = np.arange(28)/27
    figures = [plan_map(one_hot(1, 80), names[:80], long, title="word "*60), plan_map(one_hot(28, 494), flux_names(), long, title="w"*200),
               energy_map(rng.random((560, 2)), names, long, gamma=1.5), shares(one_hot(1, 5), long), crossing(rng.random(560)*3, progress*1.5 + .2, progress, names),
               crossing(rng.random(5), [.5], [0.], names[:5]), energy_blocks(rng.random((494, 2)), flux_names(), long, gamma=1.5), energy_blocks(rng.random((560, 2)), names, long, gamma=[1.5, 2.]),
               overlap_map(rng.random((560, 64)), rng.random((560, 64)), names, chance=(.1, .1), title="t "*100), overlap_map(rng.random((494, 4)), rng.random((494, 4)), flux_names()),
               spectra({name: rng.random(64) for name in long}, title="s "*90), spectra({f"layer {i}": rng.random(3 + i) for i in range(9)}),
               probe_sheet([[np.zeros((64, 64, 3)), None]]*6, rng.random(6)*2, [*range(5), "a long name for a seed"]), probe_sheet([[np.zeros((1024, 1024))]*2], [.0]),
               strip([np.zeros((64, 64))]*5, long + ["a", "b", "c"], title="t "*100),
               contact_sheet([[np.zeros((64, 64))]*3]*2, long, ["a b c d "*9]*3)]
    for fig in figures:
        width, height = fig.get_size_inches()*fig.dpi
        fig.canvas.draw()
        inside = [text for axes in fig.axes for text in [*axes.texts, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()]]
        for text in [*fig.texts, *inside]:
            if not text.get_text(): continue
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, (text.get_text()[:40], box, width, height)


def test_tensors_of_every_kind():
    torch = pytest.importorskip("torch")
    weights, names = one_hot(4, 8), sdxl_names()[:8]
    for tensor in (torch.tensor(weights), torch.tensor(weights).bfloat16(), torch.tensor(weights, requires_grad=True), torch.tensor(weights).half()):
        fig = plan_map(tensor, names, LORAS)
        assert np.allclose(fig.axes[0].images[0].get_array(), plan_map(weights, names, LORAS).axes[0].images[0].get_array())
    assert strip([torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), torch.zeros(1, 8, 8).bfloat16()])


def test_both_in_full_is_not_half_and_half():
    names = ["unet.a.to_q", "unet.b.to_q", "unet.c.to_q"]
    fig = plan_map([[[1, 1], [.5, .5], [0, 0]]], names, LORAS)
    both, half, none = (image.get_array()[0, 0] for image in fig.axes[0].images)
    assert np.allclose(both, rgb(BOTH)) and np.allclose(none, rgb(NEITHER)) and np.abs(both - half).min() > .2
    assert {"both in full", "shared", "neither"} <= set(texts(fig))
    assert not {"both in full", "shared", "neither"} & set(texts(plan_map(one_hot(3, 3), names, LORAS)))


def test_sides_add_up_and_always_stays_out():
    fig = plan_map([[[.5, .5, 0, 1]]], ["unet.a.to_q"], ["dog", "cat", "ink", "fast"], ["subject", "subject", "style", "always"])
    assert np.allclose(fig.axes[0].images[0].get_array(), rgb(SUBJECT))
    assert {"subject: dog, cat", "style: ink", "always, not in the map: fast"} <= set(texts(fig))
    fig = shares([[[.5, .5, 1, 1]]], ["dog", "ink", "fast", "cat"], ["subject", "style", "always", "subject"])
    assert np.allclose(fig.axes[0].patches[0].get_facecolor()[:3], rgb(SUBJECT))


def test_names_with_signs_of_mathematics_are_drawn_as_they_are():
    fig = plan_map(one_hot(2, 2), ["unet.$a$.to_q", "unet.b_{.to_q"], ["$x^2", "_{"], title="100 $ and $ more")
    assert "100 $ and $ more" in texts(fig) and figure_png(fig)


def test_wrong_shapes_state_both():
    names, weights = sdxl_names()[:8], one_hot(4, 8)
    for call, have, want in [(lambda: plan_map(weights, names[:7], LORAS), "[4, 8, 2]", "[any, 7, 2]"),
                             (lambda: plan_map(weights[0], names, LORAS), "[8, 2]", "[any, 8, 2]"),
                             (lambda: plan_map(weights, names, ["a"]), "[4, 8, 2]", "[any, 8, 1]"),
                             (lambda: shares(weights, ["a"]), "[4, 8, 2]", "[any, any, 1]"),
                             (lambda: energy_map(weights[0], names[:3], LORAS), "[8, 2]", "[3, 2]"),
                             (lambda: energy_blocks(weights[0], names[:3], LORAS), "[8, 2]", "[3, 2]"),
                             (lambda: overlap_map(weights[0], weights[0], names[:3]), "[8, 2]", "[3, any]"),
                             (lambda: crossing(np.ones(8), np.ones(4), np.ones(5)), "[5]", "[4]"),
                             (lambda: crossing(np.ones(8), np.ones(4), np.ones(4), names[:2]), "8 ratios", "2 names"),
                             (lambda: cell_colours(np.ones(3), np.ones(4)), "[3]", "[4]"),
                             (lambda: repaint(plan_map(weights, names, LORAS), weights[:3]), "[3, 8, 2]", "[4, 8, 2]")]:
        with pytest.raises(ValueError) as error: call()
        assert have in str(error.value) and want in str(error.value), str(error.value)
    for call in (lambda: plan_map(np.zeros((0, 8, 2)), names, LORAS), lambda: plan_map(weights*np.nan, names, LORAS), lambda: crossing([np.nan], [1.], [0.]),
                 lambda: crossing([-1.], [1.], [0.]), lambda: strip([]), lambda: contact_sheet([]), lambda: plan_map(weights, names, LORAS, ["hero", "style"])):
        with pytest.raises(ValueError): call()


def test_a_crossing_says_why_each_marked_layer_turns():
    "The label of a layer names its step and the two numbers that decide; a dotted line leads there from the level."
    names, progress = sdxl_names()[:80], np.arange(50)/49
    ratios, ramp = np.linspace(.5, 3, 80), 1.5*progress + .6
    fig = crossing(ratios, ramp, progress, names, marked=[names[20], 79, 0])
    said = [text.get_text().split("\n")[1] for text in fig.axes[0].texts if "\n" in text.get_text()]
    step = int(np.flatnonzero(ramp >= ratios[20])[0])
    assert said[0].startswith(f"from step {step}: ratio {ratios[20]:.3g}") and float(said[0].split("S = ")[1]) >= float(said[0].split("ratio ")[1].split(" ")[0])
    assert said[1] == "ratio 3: subject throughout" and said[2] == "ratio 0.5: style throughout"
    drops = fig.axes[0].collections[2].get_segments()
    assert len(drops) == 1 and np.allclose(drops[0][:, 0], step - .5) and np.isclose(drops[0][1, 1], ratios[20])
    falls = crossing([1., 2.], [.5, 1.5, .5], [0, .5, 1], marked=[0, 1])
    assert "ratio 1: turns at steps 1, 2" in falls.axes[0].texts[0].get_text()
    assert "from step 1: ratio 1 > S = 0.5" in crossing([1.], [1.5, .5], [0, 1], marked=[0]).axes[0].texts[0].get_text()


def test_blocks_add_up_to_the_whole():
    from loramix.diagrams import block_sums
    names, energy = flux_names(), np.random.default_rng(0).random((494, 2))
    labels, counts, sums = block_sums(energy, names)
    assert len(labels) == 57 and sum(counts) == 494 and np.allclose(sums.sum(0), energy.sum(0))
    shuffled = np.random.default_rng(1).permutation(494)
    assert np.allclose(block_sums(energy[shuffled], [names[i] for i in shuffled])[2], sums)


def test_overlap_cells_follow_the_flow_of_data():
    names = sdxl_names()
    cosines = np.random.default_rng(0).random((560, 3))
    cosines[5] = np.nan
    fig = overlap_map(cosines, cosines, names)
    drawn = np.concatenate([image.get_array() for image in fig.axes[1].images])
    for row, layer in enumerate(layer_order(names)):
        shared = cosines[layer, :, None]**2
        wanted = rgb(drawing.PAPER) if layer == 5 else (1 - shared)*rgb(NEITHER) + shared*rgb(BOTH)
        assert np.allclose(drawn[row], wanted)
    assert "blank: in one file only" in texts(fig)


def test_extreme_energies_and_ratios():
    names = sdxl_names()[:4]
    for energy in (np.zeros((4, 2)), np.full((4, 2), 3.), [[1e-12, 1e12], [0, 1], [1, 0], [5, 5]]):
        assert figure_png(energy_map(energy, names, LORAS, gamma=[2., 1.]))
    for ratios, ramp in (([np.inf, 0, 1, 2], [0., .5, 1.]), ([0, 0, 0, 0], [0., 0., 0.]), ([1e-9, 1e9, 1, 1], [1., .2, 1.])):
        assert figure_png(crossing(ratios, ramp, [0, .5, 1], names, marked=names))


def test_pictures_of_every_size_are_exact():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for scale, count in ((4, 1), (4, 3), (3, 4), (2, 5)):
        shown = strip([small]*count).axes[0].images[0].get_array()
        assert (shown == small.repeat(scale, 0).repeat(scale, 1)).all()
    fig = strip([small, small], ["a", "b"], scale=3, title="exact")
    page = np.asarray(Image.open(io.BytesIO(figure_png(fig))).convert("RGB"))
    box = fig.axes[1].get_window_extent()
    x, y = round(box.x0), page.shape[0] - round(box.y1)
    assert (page[y:y + 192, x:x + 192] == small.repeat(3, 0).repeat(3, 1)).all()
    large = strip([Image.new("RGB", (1024, 768), (10, 20, 30))]*5).axes[0].images[0].get_array()
    assert max(large.shape) <= 160 and (large == [10, 20, 30]).all()
    assert len(strip([small]*13).axes) == 13
