"Exports read by others: diffusers, PEFT, kohya's rule by hand, the names of real files."
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from tiny import BUILD, WIDE, denoiser, run, quiet  # noqa: F401 (quiet is a fixture)
from loramix.export import kohya_name, phase_loras, phase_starts, save_lora, static_lora, time_error
from loramix.fusion import fuse
from loramix.lora import LowRank, read_lora
from loramix.names import layer_table
from loramix.merges import direct_merge, np_merge, record
from loramix.plan import make_plan
from loramix.samplers import apply_lora

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = os.environ.get("LORAMIX_TEST_DATA")
FLOAT = dict(dtype=torch.float32)


def pair(pipe, layers=WIDE, text=False):
    "Two LoRAs of other ranks and scales; the second lacks a layer, so that a merge has layers of three ranks."
    states = [tiny.lora_state(pipe, seed, rank, .2, layers, text) for seed, rank in ((1, 2), (2, 3))]
    c, s = (dataclasses.replace(read_lora(state), name=name) for state, name in zip(states, ("dog", "ink")))
    c = dataclasses.replace(c, layers={name: dataclasses.replace(u, scale=.37) for name, u in c.layers.items()})
    lost = next(iter(s.denoiser))
    return c, dataclasses.replace(s, layers={name: u for name, u in s.layers.items() if name != lost})


def same(a, b, **near):
    assert set(a.layers) == set(b.layers)
    for name in a.layers: torch.testing.assert_close(a.layers[name].dense(), b.layers[name].dense().view(a.layers[name].shape), **near)


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_draws_from_the_file_what_we_draw(family, layout, tmp_path):
    "`load_lora_weights` of the direct plan's static export, text encoders included, against our fusion of the plan itself."
    if (family, layout) == ("flux", "kohya"): pytest.skip("kohya's FLUX names need FLUX' own shapes; see the test of the fused layers")
    pipe, other = (BUILD[family](dtype=torch.float64) for _ in range(2))   # float32 rounds a picture of ± 50 by 4e-5, more or less by the processor
    text = family != "flux"
    c, s = pair(pipe, tiny.ATTENTION if family == "flux" else WIDE, text)
    layers = tuple(dict.fromkeys((*c.denoiser, *s.denoiser)))
    plan = make_plan(torch.tensor([[float(n in c.layers), float(n in s.layers)] for n in layers]).expand(4, -1, -1), layers, ("dog", "ink"), ("subject", "style"), dict(name="direct"), strengths=(.8, 1.1))
    with fuse(pipe, plan, [c, s]): ours = run(pipe)
    exported = static_lora(plan, [c, s])
    assert len({u.rank for u in exported.layers.values()}) > 1 and bool(exported.text_encoders) == text
    other.load_lora_weights(str(save_lora(exported, tmp_path/"x.safetensors", layout, **FLOAT)))
    other.to(torch.float64)
    torch.testing.assert_close(run(other), ours, atol=2e-5, rtol=1e-6)
    with pytest.raises(AssertionError): torch.testing.assert_close(run(pipe), ours, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", BUILD)
def test_peft_reads_the_folder(family, tmp_path):
    "`PeftModel.from_pretrained` on the bare denoiser, and on a text encoder: every merged weight is ours."
    from peft import PeftModel
    pipe, text = BUILD[family](), family != "flux"
    c, s = pair(pipe, tiny.ATTENTION if family == "flux" else WIDE, text)
    merged = np_merge(c, s)
    folder = save_lora(merged, tmp_path/"adapter", "peft", **FLOAT)
    part, module = denoiser(pipe)
    parts = {part: module, **({"text_encoder": pipe.text_encoder} if text else {})}
    for part, module in parts.items():
        base = {name: p.detach().clone() for name, p in module.named_parameters()}
        model = PeftModel.from_pretrained(module, folder/part if text else folder).merge_and_unload()
        changed = 0
        for name, p in model.named_parameters():
            layer = f"{part}.{name.removesuffix('.weight')}"
            update = merged.layers.get(layer) or merged.layers.get(f"{part}.text_model.{name.removesuffix('.weight')}")
            if update is None or name.endswith("bias"): assert torch.equal(p, base[name]); continue
            torch.testing.assert_close(p - base[name], update.dense().view(p.shape), atol=1e-5, rtol=1e-4)
            changed += 1
        assert changed == sum(name.startswith(f"{part}.") for name in merged.layers)


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
@pytest.mark.parametrize("dtype,eps", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_round_trip(layout, dtype, eps, tmp_path):
    "Through `read_lora`, with the record and without stale notes of the file it came from."
    c, s = pair(tiny.sd(), text=layout != "peft")
    c = dataclasses.replace(c, metadata={"ss_network_alpha": "99", "lora_adapter_metadata": json.dumps({"unet.r": 77}), "sshs_model_hash": "x", "trigger_words": "[\"sks\"]"})
    for lora in (c, np_merge(c, s)):
        back = read_lora(save_lora(lora, tmp_path/f"{layout} {dtype} {lora.name}", layout, dtype=dtype))
        same(lora, back, atol=eps, rtol=eps)
        assert back.trigger_words == ("sks",) and "sshs_model_hash" not in back.metadata and back.metadata.get("ss_network_alpha") != "99"
        assert record(back) == record(lora)
        assert not back.report.unused


def test_kohya_by_the_rule():
    "alpha/rank · up @ down with tensors of the file alone; a negative scale, a scale of 0."
    from safetensors import safe_open
    import tempfile
    c, _ = pair(tiny.sd())
    scales = [.37, 2., -1., 0.]
    lora = dataclasses.replace(c, layers={name: dataclasses.replace(u, scale=scales[i % 4]) for i, (name, u) in enumerate(c.layers.items())})
    with tempfile.TemporaryDirectory() as folder, safe_open(save_lora(lora, Path(folder)/"x.safetensors", "kohya", **FLOAT), "pt") as file:
        keys = set(file.keys())
        assert len(keys) == 3*len(lora.layers)
        for name, update in lora.layers.items():
            stem = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
            down, up, alpha = (file.get_tensor(f"{stem}.{end}") for end in ("lora_down.weight", "lora_up.weight", "alpha"))
            assert alpha.shape == () and alpha != 0
            torch.testing.assert_close(alpha.item()/down.shape[0]*(up.flatten(1) @ down.flatten(1)).view(update.shape), update.dense(), atol=1e-6, rtol=1e-5)
        assert file.metadata()["ss_network_module"] == "networks.lora" and file.metadata()["ss_network_alpha"] == "Dynamic"


def sdxl_lora(layers, rank=1):
    "A LoRA with SDXL's own shapes on some layers."
    table, draw = layer_table("sdxl"), torch.Generator().manual_seed(0)
    state = {}
    for name in layers:
        shape = table[name]
        state[f"{name}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=draw)
        state[f"{name}.lora_B.weight"] = torch.randn(shape[0], rank, *[1]*(len(shape) - 2), generator=draw)
    return read_lora(state)


@pytest.mark.skipif(not DATA, reason="LORAMIX_TEST_DATA is not set: the key layouts are not here")
def test_sdxl_names_are_those_of_real_files():
    "Our kohya names of every SDXL layer, against the key list of a full kohya file; and each list's names are found by ours."
    theirs = {key.rsplit(".lora_down", 1)[0] for key in json.loads((Path(DATA)/"layouts/generated__sdxl_kohya_sgm.json").read_text()) if ".lora_down" in key}
    ours = {kohya_name(name, "sdxl") for name in layer_table("sdxl")}
    assert len(theirs) > 700 and theirs <= ours
    assert len(ours) == len(layer_table("sdxl"))


def test_sdxl_file_through_diffusers_own_converter(tmp_path):
    "diffusers maps the SGM names back to its own; every tensor arrives under our layer's name with its alpha."
    from diffusers import StableDiffusionXLPipeline
    from safetensors.torch import load_file
    names = [name for name in layer_table("sdxl") if name.startswith("unet.") and ("attn1.to_q" in name or "attn2.to_v" in name or ".proj_in" in name)]
    lora = sdxl_lora(names)
    lora = dataclasses.replace(lora, layers={name: dataclasses.replace(u, scale=.5) for name, u in lora.layers.items()})
    assert lora.family == "sdxl"
    path = save_lora(lora, tmp_path/"x.safetensors", "kohya", **FLOAT)
    assert any(key.startswith("lora_unet_input_blocks_4_1_") for key in load_file(path))
    class Config: layers_per_block = 2
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(load_file(path), unet_config=Config())
    for name, update in lora.layers.items():
        end = name.rsplit(".", 1)[1]
        stem = f"{name.removesuffix('.' + end)}.processor.{end}_lora" if end.startswith("to_") else f"{name}.lora"      # how diffusers calls the two kinds
        torch.testing.assert_close(state[f"{stem}.down.weight"].view(update.down.shape), update.down)
        torch.testing.assert_close(state[f"{stem}.up.weight"].view(update.up.shape), update.up)
        assert alphas[f"{stem}.down.weight.alpha" if end.startswith("to_") else f"{name}.alpha"] == .5
    same(lora, read_lora(path), atol=1e-6, rtol=1e-6)


def test_flux_layers_are_fused_and_come_back(tmp_path):
    "kohya's FLUX file has q, k and v (and the MLP) in one matrix: read back by us, converted by diffusers, all parts as before; missing parts are zero."
    from diffusers import FluxPipeline
    from safetensors.torch import load_file
    table, draw = layer_table("flux"), torch.Generator().manual_seed(0)
    names = [f"transformer.transformer_blocks.3.{end}" for end in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "norm1.linear")]
    names += [f"transformer.single_transformer_blocks.5.{end}" for end in ("attn.to_q", "proj_mlp", "proj_out")] + ["transformer.norm_out.linear"]
    state = {}
    for i, name in enumerate(names):
        rows, columns = table[name]
        state |= {f"{name}.lora_A.weight": torch.randn(1 + i % 2, columns, generator=draw), f"{name}.lora_B.weight": torch.randn(rows, 1 + i % 2, generator=draw)}
    lora = read_lora(state)
    assert lora.family == "flux"
    path = save_lora(lora, tmp_path/"x.safetensors", "kohya", **FLOAT)
    file = load_file(path)
    assert file["lora_unet_double_blocks_3_img_attn_qkv.lora_up.weight"].shape == (9216, 4)
    assert file["lora_unet_single_blocks_5_linear1.lora_up.weight"].shape == (21504, 3)
    back = read_lora(path)
    for name, update in back.layers.items():
        if name in lora.layers: torch.testing.assert_close(update.dense(), lora.layers[name].dense(), atol=1e-5, rtol=1e-5)
        else: assert not update.up.any(), name
    assert set(lora.layers) <= set(back.layers)
    theirs = FluxPipeline.lora_state_dict({key: value for key, value in file.items() if "final_layer" not in key})
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    for name in names[:-1]:
        A, B = theirs[f"{name}.lora_A.weight"], theirs[f"{name}.lora_B.weight"]
        torch.testing.assert_close(B.float() @ A.float(), lora.layers[name].dense(), atol=1e-4, rtol=1e-4)


def test_sd1_names():
    "The commonest spelling, checked by diffusers' and our own readers in the tests above, spelled out once."
    assert kohya_name("unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj", "sd1") == "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj"
    assert kohya_name("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "sd1") == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert kohya_name("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "sdxl") == "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"


def moving(c, s, steps=6):
    "A plan whose weights move all the time."
    layers = tuple(dict.fromkeys((*c.denoiser, *s.denoiser)))
    held = torch.tensor([[float(n in x.layers) for x in (c, s)] for n in layers])
    return make_plan(torch.rand(steps, len(layers), 2, generator=torch.Generator().manual_seed(4))*held, layers, ("dog", "ink"), ("subject", "style"), dict(name="test"), strengths=(.5, 2.))


@pytest.mark.parametrize("rank", [None, 2])
def test_static_lora_and_its_errors(rank):
    "Mean over the steps in float64; both stated errors against dense sums."
    c, s = pair(tiny.sd())
    plan = moving(c, s)
    made = static_lora(plan, [c, s], rank=rank)
    lost = whole = moved = total = 0.
    for i, name in enumerate(plan.layers):
        deltas = [x.layers[name].dense(torch.float64) if name in x.layers else 0 for x in (c, s)]
        at = [sum(w*d for w, d in zip(row.tolist(), deltas)) for row in plan.weights[:, i].double()]
        mean = sum(at)/len(at)
        moved, total = moved + sum(float((x - mean).square().sum()) for x in at), total + sum(float(x.square().sum()) for x in at)
        lost, whole = lost + float((made.layers[name].dense(torch.float64) - mean).square().sum()), whole + float(mean.square().sum())
    facts = record(made)
    assert abs(facts["time_error"] - np.sqrt(moved/total)) < 1e-6
    assert abs(facts["error"] - np.sqrt(lost/whole)) < (2e-3 if rank else 1e-6)
    assert (facts["error"] > .01) == (rank is not None)


def test_phases_replay_the_plan_in_diffusers(tmp_path):
    "A plan of three stretches as LoRA files, switched by `set_adapters` in diffusers' callback, against the plan fused by us."
    pipe, other = tiny.sd(), tiny.sd()
    c, s = pair(pipe)
    plan = moving(c, s)
    rows = plan.choice[[0, 0, 1, 1, 1, 2]]
    plan = dataclasses.replace(plan, choice=rows)
    phases = phase_loras(plan, [c, s])
    assert [start for start, _ in phases] == [0, 2, 5]
    with fuse(pipe, plan, [c, s]): ours = run(pipe, steps=6)
    for start, lora in phases: other.load_lora_weights(str(save_lora(lora, tmp_path/f"{start}.safetensors", **FLOAT)), adapter_name=f"p{start}")
    def turn(pipe, step, timestep, kwargs):
        if step + 1 in dict(phases): pipe.set_adapters(f"p{step + 1}")
        return kwargs
    other.set_adapters("p0")
    torch.testing.assert_close(run(other, steps=6, callback_on_step_end=turn), ours, atol=2e-5, rtol=1e-4)


def test_more_phases_lose_less_and_all_lose_nothing():
    c, s = pair(tiny.sd())
    plan = moving(c, s)
    lost = [record(phase_loras(plan, [c, s], phases=k)[0][1])["time_error"] for k in range(1, 7)]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 1e-7
    assert abs(lost[0] - record(static_lora(plan, [c, s]))["time_error"]) < 1e-9
    for bad in (0, 7, 2.): 
        with pytest.raises(ValueError, match="phases"): phase_loras(plan, [c, s], phases=bad)


def test_notes_and_errors(tmp_path):
    c, s = pair(tiny.sd())
    plan = moving(c, s)
    half = dataclasses.replace(plan, unconditional_choice=torch.zeros_like(plan.choice))
    assert any("both halves" in note for note in static_lora(half, [c, s]).report.notes)
    assert any("move in time" in note for note in static_lora(plan, [c, s]).report.notes)
    big = dataclasses.replace(c, layers={name: dataclasses.replace(u, scale=1e7) for name, u in c.layers.items()})
    for call, words in ((lambda: save_lora(c, tmp_path/"x", "comfy"), "layout"), (lambda: save_lora(big, tmp_path/"x"), "float32"), (lambda: save_lora(c, tmp_path/"x", dtype=torch.int8), "dtype"),
                        (lambda: save_lora(c, tmp_path/"x.safetensors", "peft"), "folder")):
        with pytest.raises(ValueError, match=words): call()
    transformer = dataclasses.replace(c, layers={name.replace("unet.", "transformer."): u for name, u in c.layers.items()})
    with pytest.raises(ValueError, match="FLUX"): save_lora(transformer, tmp_path/"x", "kohya")
    assert not (tmp_path/"x").exists()
    assert phase_starts(np.zeros((4, 2))) == [0] and time_error(np.zeros((2, 1, 1)), [np.eye(1)]) == 0.
