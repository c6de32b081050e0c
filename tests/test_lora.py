"Reading LoRA files: real files, key layouts, diffusers and PEFT as oracles, and everything that must be refused."
import hashlib
import json
import math
import os
import random
import re
import runpy
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramix.lora import LoRA, LoRAError, LowRank, read_lora
from loramix.names import FAMILIES, layer_names, layer_table, read_prefix, sgm_name

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ["LORAMIX_TEST_DATA"]) if os.environ.get("LORAMIX_TEST_DATA") else None
needs_data = pytest.mark.skipif(DATA is None or not (DATA/"loras").is_dir(), reason="LORAMIX_TEST_DATA is not set: the public LoRA files are not here")


def corpus():
    "The rows of the table in the README beside the files: name → (base, layers, ranks, energy, notes)."
    if DATA is None or not (DATA/"loras"/"README.md").is_file(): return {}
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in (DATA/"loras"/"README.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[2:] for row in rows if len(row) == 7}


def layouts(): return sorted((DATA/"layouts").glob("*.json")) if DATA is not None else []


def filled(layout, seed=0):
    "Seeded random tensors in the shapes of a layout; alpha 3."
    g = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=g)/10 if shape else torch.tensor(3.) for key, shape in json.loads(Path(layout).read_text()).items()}


def pair(ins=8, outs=8, rank=2, seed=0):
    "One down and up."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rank, ins, generator=g), torch.randn(outs, rank, generator=g)


def state(*layers, ends=("lora_A.weight", "lora_B.weight"), **sizes):
    "A state dict with one pair per layer."
    out = {}
    for n, layer in enumerate(layers): out[f"{layer}.{ends[0]}"], out[f"{layer}.{ends[1]}"] = pair(seed=n, **sizes)
    return out


def close(ours, theirs, tolerance=1e-5):
    "Relative difference of two tensors against the larger of their norms."
    theirs = theirs.to(torch.float64)
    assert tuple(ours.shape) == tuple(theirs.shape)
    assert (ours.double() - theirs).norm() <= tolerance*theirs.norm().clamp_min(1e-30)


# real files

@needs_data
@pytest.mark.parametrize("name", corpus())
def test_real_file(name):
    "Layers, ranks, energy and family as the table says, and every tensor accounted for."
    base, count, ranks, energy, notes = corpus()[name]
    lora = read_lora(DATA/"loras"/name)
    assert len(lora.layers) == int(count)
    told = {int(r) for r in re.findall(r"\d+", ranks)}
    found = {update.rank for update in lora.layers.values()}
    assert found == ({r*r for r in told} if "LoKr" in lora.report.format else told)
    scales = {update.scale for update in lora.layers.values()}
    # the table leaves out scales that stand in PEFT settings; they are 4.0 in two files
    assert scales == ({4.0} if "scale 4.0" in notes else {1.0})
    total = sum(update.energy() for update in lora.layers.values())/scales.pop()**2
    assert total == pytest.approx(float(energy), rel=2e-5)
    expected = {"SD 1.x": "sd1", "SD 2.x": "sd2", "FLUX": "flux"}.get(base)
    assert expected is None or lora.family == expected
    assert {left.key for left in lora.report.unused} == ({"<s1>", "<s2>"} if "disney" in name else set())
    assert lora.sha256 == hashlib.sha256((DATA/"loras"/name).read_bytes()).hexdigest()
    assert all(name.startswith(("unet.", "transformer.", "text_encoder.text_model.")) for name in lora.layers)


BAD = {"HK200202": "Git LFS pointer", "wsl5300": "a text that begins", "JamesQFreeman": "vision transformer", "filip131311": "textual-inversion", "Harshad071": "T5.*every lora_B in it is zero",
       "Srikanth1408": "cut short"}


@needs_data
@pytest.mark.parametrize("start", BAD)
def test_bad_file(start):
    "Refused with the file's name and the true cause, in one line."
    path = next((DATA/"loras"/"bad").glob(start + "*"))
    with pytest.raises(LoRAError, match=BAD[start]) as error: read_lora(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)


@needs_data
@pytest.mark.parametrize("name", corpus())
def test_sums_of_real_files(name):
    "Energy, L1 and top-K against dense float64, on every seventh layer."
    updates = list(read_lora(DATA/"loras"/name).layers.values())
    for update in updates[len(name) % 7::7] or updates: check_sums(update)


def check_sums(update, ks=(1, 16, 256)):
    "The three sums of one update against the dense product in float64."
    up, down = update.up.double().flatten(1), update.down.double().flatten(1)
    dense = (update.scale*(up @ down)).abs()
    assert update.energy() == pytest.approx(dense.square().sum().item(), rel=1e-5, abs=1e-30)
    assert update.abs_sum() == pytest.approx(dense.sum().item(), rel=1e-5, abs=1e-30)
    for k in ks: assert update.top_sum(k) == pytest.approx(dense.flatten().topk(min(k, dense.numel())).values.sum().item(), rel=1e-5, abs=1e-30)


@needs_data
def test_siblings_are_equal():
    "The almost-kohya file and its diffusers sibling hold the same updates under the same names."
    new, old = (read_lora(DATA/"loras"/f"timohavdk__sd-lora__{name}.safetensors") for name in ("new", "2100-lora"))
    assert set(new.layers) == set(old.layers)
    for name, update in new.layers.items(): close(update.dense(), old.layers[name].dense())


# key layouts

LAYOUTS = {"generated__sd15_kohya_locon": ("sd1", 278, 72), "generated__sdxl_kohya_sgm": ("sdxl", 722, 264), "invokeai__anima_lora_kohya": ("unknown", 11, 0), "invokeai__anima_lora_peft": ("unknown", 6, 0),
           "invokeai__anima_lora_lokr": "DoRA", "invokeai__flux_control": "LoRA with biases", "invokeai__flux_lokr": "LoKr of two whole matrices", "invokeai__flux_lora_aitoolkit": ("flux", 418, 0),
           "invokeai__flux_lora_diffusers_base_model": ("flux", 381, 0), "invokeai__flux_lora_diffusers_format": ("flux", 494, 0), "invokeai__flux_lora_kohya_format": ("flux", 494, 0),
           "invokeai__flux_lora_kohya_with_te1": ("flux", 494, 72), "invokeai__flux_lora_xlabs": ("flux", 24, 0), "invokeai__qwen": ("unknown", 3, 0)}


@pytest.mark.skipif(not layouts(), reason="LORAMIX_TEST_DATA is not set: the key layouts are not here")
@pytest.mark.parametrize("path", layouts(), ids=lambda path: path.stem)
def test_layout(path):
    "Every layout is read in full, with the shapes of its network, or refused by name."
    expected = next(value for start, value in LAYOUTS.items() if path.stem.startswith(start))
    shapes = json.loads(path.read_text())
    if isinstance(expected, str):
        with pytest.raises(LoRAError, match=expected): read_lora({key: torch.tensor(1.).expand(shape) for key, shape in shapes.items()})
        return
    g = torch.Generator().manual_seed(0)
    numbers = torch.randn(2**20, generator=g)
    tensors = {key: (numbers if math.prod(shape) <= 2**20 else numbers.repeat(-(-math.prod(shape)//2**20)))[:math.prod(shape)].reshape(shape) if shape else torch.tensor(3.) for key, shape in shapes.items()}
    lora = read_lora(tensors)
    assert (lora.family, len(lora.denoiser), len(lora.text_encoders)) == expected
    assert not lora.report.unused
    table = layer_table(lora.family) if lora.family != "unknown" else {}
    assert all(update.shape == table[name] for name, update in lora.layers.items() if table)
    alphas = any(key.endswith(".alpha") for key in shapes)
    assert all(update.scale == pytest.approx(3/update.rank if alphas else 1) for update in lora.layers.values())


def test_tables_are_regenerated():
    "The tables in the package are those of diffusers' and transformers' own architectures."
    made = runpy.run_path(str(HERE.parent/"tools"/"layer_tables.py"))["tables"]()
    for family, parts in made.items():
        assert layer_table(family) == {f"{part}.{name}": tuple(shape) for part, layers in parts.items() for name, shape in layers.items()}
    assert sum(path.stat().st_size for path in (HERE.parent/"loramix"/"data"/"layers").iterdir()) < 20_000


# diffusers and PEFT as oracles

def tiny_unet(cross=12):
    "A random UNet with every kind of layer, a few thousand weights."
    from diffusers import UNet2DConditionModel
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=2, cross_attention_dim=cross, attention_head_dim=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def unet_pairs(unet, kinds=("attn1", "attn2", "ff.net"), convs=False, rank=3):
    "Random pairs for the layers of a UNet: name → (down, up)."
    g, out = torch.Generator().manual_seed(3), {}
    for name, module in unet.named_modules():
        linear = isinstance(module, torch.nn.Linear) and any(kind in name for kind in kinds)
        if not linear and not (convs and isinstance(module, torch.nn.Conv2d) and "resnets" in name): continue
        outs, *ins = module.weight.shape
        out[name] = torch.randn(rank, *ins, generator=g), torch.randn(outs, rank, *([1, 1] if len(ins) == 3 else []), generator=g)
    return out


def diffusers_deltas(unet, tensors):
    "ΔW of every layer as diffusers and PEFT apply a state dict: name → tensor."
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin
    converted, alphas = Mixin.lora_state_dict(dict(tensors), unet_config=unet.config)
    Mixin.load_lora_into_unet(converted, alphas, unet, adapter_name="here")
    return {name: module.get_delta_weight("here").detach() for name, module in unet.named_modules() if hasattr(module, "get_delta_weight") and "here" in module.lora_A}


OLD_STYLE = ("attn1", "attn2")
SPELLINGS = {
    "diffusers": (lambda n: f"unet.{n}", ("lora_A", "lora_B"), None), "in between": (lambda n: f"unet.{n}.lora", ("down", "up"), None),
    "old": (lambda n: "unet." + ".processor.".join(n.removesuffix(".0").rsplit(".", 1)) + "_lora", ("down", "up"), None),
    "kohya": (lambda n: "lora_unet_" + n.replace(".", "_"), ("lora_down", "lora_up"), 1.5)}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_against_diffusers(kind):
    "The same names and the same ΔW as diffusers' own loader, for each spelling it reads."
    spell, (a, b), alpha = SPELLINGS[kind]
    unet = tiny_unet()
    tensors = {}
    for name, (down, up) in unet_pairs(unet, OLD_STYLE if kind == "old" else ("attn1", "attn2", "ff.net"), convs=kind in ("diffusers", "kohya")).items():
        tensors |= {f"{spell(name)}.{a}.weight": down, f"{spell(name)}.{b}.weight": up}
        if alpha: tensors[f"{spell(name)}.alpha"] = torch.tensor(alpha)
    lora, theirs = read_lora(tensors), diffusers_deltas(unet, tensors)
    assert set(lora.denoiser) == {f"unet.{name}" for name in theirs} and len(theirs) >= 24
    for name, delta in theirs.items(): close(lora.layers[f"unet.{name}"].dense(), delta)


@pytest.mark.parametrize("layer", ["unet.{}.attn1.to_q.lora_linear_layer", "unet.{}.attn1.processor.to_q_lora", "{}.attn1.to_q.lora", "unet.unet.{}.attn1.to_q.lora", "base_model.model.unet.{}.attn1.to_q.lora"])
def test_more_spellings(layer):
    "Spellings that diffusers no longer reads, or never did, are the same layer."
    block = "mid_block.attentions.0.transformer_blocks.0"
    lora = read_lora(state(layer.format(block), ends=("down.weight", "up.weight")))
    assert list(lora.layers) == [f"unet.{block}.attn1.to_q"] and not lora.report.unused
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    for spelled in (f"{text}.to_q_lora", f"{text}.q_proj.lora_linear_layer", f"{text.replace('text_model.', '')}.q_proj.lora"):
        assert list(read_lora(state(spelled, ends=("down.weight", "up.weight"))).layers) == [f"{text}.q_proj"]


@pytest.mark.parametrize("settings", [dict(r=4, lora_alpha=6), dict(r=4, lora_alpha=6, use_rslora=True), dict(r=4, lora_alpha=8, rank_pattern={"attn2.to_k": 2, "attn1.to_out.0": 3}, alpha_pattern={"attn2.to_k": 5, "to_v": 1})])
@pytest.mark.parametrize("saved", ["header", "folder"])
def test_against_peft(settings, saved, tmp_path):
    "Scales from diffusers' header metadata and from a PEFT folder are PEFT's own."
    from peft import LoraConfig, get_peft_model
    unet = tiny_unet()
    config = LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False, **settings)
    if saved == "folder": model = get_peft_model(unet, config); model.save_pretrained(tmp_path)
    else: unet.add_adapter(config); unet.save_lora_adapter(tmp_path)
    lora = read_lora(tmp_path)
    theirs = {name: module.get_delta_weight("default").detach() for name, module in unet.named_modules() if hasattr(module, "get_delta_weight")}
    assert set(lora.layers) == {f"unet.{name}" for name in theirs}
    for name, delta in theirs.items(): close(lora.layers[f"unet.{name}"].dense(), delta)
    if "rank_pattern" in settings: assert {update.rank for update in lora.layers.values()} == {2, 3, 4}


def test_saved_by_a_pipeline(tmp_path):
    "A file of `save_lora_weights` keeps the scales of UNet and text encoder apart."
    from diffusers import StableDiffusionPipeline
    tensors = state("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"), state("text_model.encoder.layers.0.self_attn.q_proj")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors[0], text_encoder_lora_layers=tensors[1],
                                              unet_lora_adapter_metadata=dict(r=2, lora_alpha=1), text_encoder_lora_adapter_metadata=dict(r=2, lora_alpha=6))
    lora = read_lora(tmp_path)
    assert {name.split(".")[0]: update.scale for name, update in lora.layers.items()} == {"unet": .5, "text_encoder": 3.}


TEXT_ENDS = dict(to_q="q_proj", to_k="k_proj", to_v="v_proj", to_out="out_proj")


def converted_pairs(converted, alphas=None):
    "name → (down, up, scale) of a state dict that diffusers converted, its attention processors spelled out."
    out = {}
    for key, down in converted.items():
        found = re.search(r"(\.lora_A|[._]lora\.down|\.lora_linear_layer\.down)\.weight$", key)
        if not found: continue
        layer = key[:found.start()].replace(".processor.", ".")
        head, _, end = layer.rpartition(".")
        if layer.startswith("text_encoder"): layer = f"{head}.{TEXT_ENDS.get(end, end)}"
        elif end == "to_out": layer += ".0"
        up = converted[key.replace("lora_A.weight", "lora_B.weight").replace(".down.weight", ".up.weight")]
        alpha = next((alphas[name] for name in (f"{key}.alpha", f"{key[:found.start()]}.alpha") if name in (alphas or {})), down.shape[0])
        out[layer] = down, up, float(alpha)/down.shape[0]
    return out


def flux_tensors(prefix, sep, ends, alpha=True):
    "FLUX' own spelling for the first double and single block and the last layers, at the true sizes, rank 1 and 2."
    h, out = 3072, {}
    sizes = {"double_blocks.0.img_attn.qkv": (h, 3*h), "double_blocks.0.txt_attn.qkv": (h, 3*h), "double_blocks.0.img_attn.proj": (h, h), "double_blocks.0.txt_attn.proj": (h, h), "double_blocks.0.img_mlp.0": (h, 4*h),
             "double_blocks.0.img_mlp.2": (4*h, h), "double_blocks.0.txt_mlp.0": (h, 4*h), "double_blocks.0.txt_mlp.2": (4*h, h), "double_blocks.0.img_mod.lin": (h, 6*h), "double_blocks.0.txt_mod.lin": (h, 6*h),
             "single_blocks.0.linear1": (h, 7*h), "single_blocks.0.linear2": (5*h, h), "single_blocks.0.modulation.lin": (h, 3*h), "final_layer.linear": (h, 64), "final_layer.adaLN_modulation.1": (h, 2*h)}
    for n, (name, (ins, outs)) in enumerate(sizes.items()):
        layer = prefix + name.replace(".", sep)
        down, up = pair(ins, outs, 1 + n % 2, seed=n)
        out |= {f"{layer}.{ends[0]}.weight": down, f"{layer}.{ends[1]}.weight": up}
        if alpha: out[f"{layer}.alpha"] = torch.tensor(float(2 + n))
    return out


def test_kohya_flux_against_diffusers():
    "Every layer of diffusers' kohya FLUX conversion, with its alpha, the split of the fused layers and the swapped halves of the last one."
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as convert
    tensors = flux_tensors("lora_unet_", "_", ("lora_down", "lora_up"))
    theirs, lora = converted_pairs(convert({key: t.clone() for key, t in tensors.items()})), read_lora(tensors)
    theirs = {name if name.startswith("transformer.") else f"transformer.{name}": value for name, value in theirs.items()}   # they leave it out for the last two
    assert lora.family == "flux" and set(lora.layers) == set(theirs) and len(theirs) == 22
    for name, (down, up, scale) in theirs.items():
        ours = lora.layers[name]
        rows = slice(0, ours.shape[0], 37)
        if name.endswith((".norm_out.linear", "transformer.proj_out")): scale = ours.scale   # where they lose alpha: "final_layer" keys
        close(ours.scale*(ours.up[rows] @ ours.down), scale*(up[rows] @ down))


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", "", "transformer.", "base_model.model."])
def test_flux_reference_names(prefix):
    "The dotted spelling of FLUX' own code, with any prefix, is the kohya file without alpha."
    kohya, dotted = read_lora(flux_tensors("lora_unet_", "_", ("lora_down", "lora_up"), False)), read_lora(flux_tensors(prefix, ".", ("lora_A", "lora_B"), False))
    assert list(kohya.layers) == list(dotted.layers) and dotted.family == "flux"
    for name, update in dotted.layers.items(): assert torch.equal(update.up, kohya.layers[name].up)


def test_xlabs_flux_against_diffusers():
    "xlabs' attention processors."
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers as convert
    tensors = {}
    for n, (name, ins, outs) in enumerate((("double_blocks.1.processor.qkv_lora1", 3072, 9216), ("double_blocks.1.processor.qkv_lora2", 3072, 9216), ("double_blocks.1.processor.proj_lora1", 3072, 3072),
                                           ("double_blocks.1.processor.proj_lora2", 3072, 3072), ("single_blocks.3.processor.qkv_lora", 3072, 9216), ("single_blocks.3.processor.proj_lora", 15360, 3072))):
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = pair(ins, outs, 2, seed=n)
    theirs, lora = converted_pairs(convert(dict(tensors))), read_lora(tensors)
    assert set(lora.layers) == set(theirs) and len(theirs) == 12
    for name, (down, up, _) in theirs.items(): assert torch.equal(lora.layers[name].up, up) and torch.equal(lora.layers[name].down, down)


@pytest.mark.skipif(not layouts(), reason="LORAMIX_TEST_DATA is not set: the key layouts are not here")
def test_sdxl_sgm_against_diffusers():
    "All 722 + 264 layers of the SDXL layout have the names and matrices of diffusers' conversion."
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin as Mixin
    settings = runpy.run_path(str(HERE.parent/"tools"/"layer_tables.py"))["UNETS"]["sdxl"]
    with torch.device("meta"): config = UNet2DConditionModel(**settings).config
    tensors = filled(DATA/"layouts"/"generated__sdxl_kohya_sgm.json")
    converted, alphas = Mixin.lora_state_dict(dict(tensors), unet_config=config)[:2]
    theirs, lora = converted_pairs(converted, alphas), read_lora(tensors)
    assert set(lora.layers) == set(theirs) and len(theirs) == 986
    for name, (down, up, scale) in theirs.items():
        ours = lora.layers[name]
        assert torch.equal(ours.down, down) and torch.equal(ours.up, up)
        assert ours.scale == pytest.approx(scale) and scale == pytest.approx(3/down.shape[0])


def test_every_kohya_name_of_every_family():
    "Each layer of each table comes back from its kohya spelling, and the UNets' from the reference code's."
    for family in FAMILIES:
        for name in layer_table(family):
            part, _, rest = name.partition(".")
            prefix = {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part]
            assert layer_names(read_prefix(prefix + rest.replace(".", "_"))) == (name,)
            if part == "unet":
                reference = sgm_name(rest, any(n.startswith(".".join(name.split(".")[:3]) + ".attentions") for n in layer_table(family)))
                assert layer_names(read_prefix("lora_unet_" + reference.replace(".", "_"))) == (name,)
                assert layer_names(read_prefix("diffusion_model." + reference)) == (name,)


def test_onetrainer_pieces():
    "OneTrainer numbers the parts of fused layers."
    layers = [f"transformer.single_blocks.0.linear1.{n}" for n in range(3)]
    lora = read_lora(state(*layers, ends=("lora_down.weight", "lora_up.weight"), ins=3072, outs=3072))
    assert [name.split("0.", 1)[1] for name in lora.layers] == ["attn.to_q", "attn.to_k", "attn.to_v"]


# LyCORIS, by its definitions

def test_lycoris_forms():
    "LoHa, LoKr and Tucker, linear and convolution, against the dense formulas."
    g = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(shape, generator=g)
    base = "unet.mid_block.x"
    loha = {"hada_w1_a": r(6, 2), "hada_w1_b": r(2, 8), "hada_w2_a": r(6, 2), "hada_w2_b": r(2, 8), "alpha": torch.tensor(1.)}
    loha_t = {"hada_t1": r(2, 2, 3, 3), "hada_w1_a": r(2, 6), "hada_w1_b": r(2, 8), "hada_t2": r(2, 2, 3, 3), "hada_w2_a": r(2, 6), "hada_w2_b": r(2, 8)}
    lokr = {"lokr_w1": r(2, 3), "lokr_w2_a": r(4, 2), "lokr_w2_b": r(2, 5), "alpha": torch.tensor(1.)}
    lokr_t = {"lokr_w1": r(3, 2), "lokr_t2": r(2, 2, 3, 3), "lokr_w2_a": r(2, 4), "lokr_w2_b": r(2, 5)}
    rebuilt = lambda t, a, b: torch.einsum("abhw,bi,ao->oihw", t, b, a)
    cases = [(loha, .5*(loha["hada_w1_a"] @ loha["hada_w1_b"])*(loha["hada_w2_a"] @ loha["hada_w2_b"])),
             (loha_t, rebuilt(loha_t["hada_t1"], loha_t["hada_w1_a"], loha_t["hada_w1_b"])*rebuilt(loha_t["hada_t2"], loha_t["hada_w2_a"], loha_t["hada_w2_b"])),
             (lokr, .5*torch.kron(lokr["lokr_w1"], lokr["lokr_w2_a"] @ lokr["lokr_w2_b"])),
             (lokr_t, torch.kron(lokr_t["lokr_w1"][:, :, None, None].contiguous(), rebuilt(lokr_t["lokr_t2"], lokr_t["lokr_w2_a"], lokr_t["lokr_w2_b"]).contiguous()))]
    for tensors, dense in cases: close(read_lora({f"{base}.{key}": t for key, t in tensors.items()}).layers[base].dense(), dense)
    with pytest.raises(LoRAError, match="do not fit each other"): read_lora({f"{base}.{key}": t for key, t in (loha | {"hada_w2_a": r(5, 2)}).items()})
    with pytest.raises(LoRAError, match="LoKr without lokr_w2_b"): read_lora({f"{base}.{key}": t for key, t in lokr.items() if key != "lokr_w2_b"})
    big = {"hada_w1_a": torch.ones(20000, 64), "hada_w1_b": torch.ones(64, 20000), "hada_w2_a": torch.ones(20000, 64), "hada_w2_b": torch.ones(64, 20000)}
    with pytest.raises(LoRAError, match="rank 4096 when multiplied out"): read_lora({f"{base}.{key}": t for key, t in big.items()})


# sums

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_sums_in_every_dtype(dtype):
    "Factors are brought to float32 before anything is multiplied; also long rows, high ranks, ties and convolutions."
    g = torch.Generator().manual_seed(0)
    for outs, ins, rank in ((700, 900, 16), (3, 200_000, 2), (40, 30, 64), (1, 1, 1)):
        check_sums(LowRank(torch.randn(rank, ins, generator=g).to(dtype), torch.randn(outs, rank, generator=g).to(dtype), -0.3), ks=(1, 17, 4096))
    check_sums(LowRank(torch.randn(4, 6, 3, 3, generator=g).to(dtype), torch.randn(50, 4, 1, 1, generator=g).to(dtype), 2.0))
    check_sums(LowRank(torch.ones(1, 500).to(dtype), torch.ones(900, 1).to(dtype), 1.0), ks=(5, 1000))   # all ties
    check_sums(LowRank(torch.zeros(1, 500).to(dtype), torch.ones(900, 1).to(dtype), 1.0))


def test_sums_are_fast():
    "A whole SDXL file of rank 16: all energies in a second of processor time, and a 20th of its L1 and top-K in a 20th of their budget."
    layers = [shape for name, shape in layer_table("sdxl").items() if name.startswith("unet.") and (".attn1." in name or ".attn2." in name)]
    assert len(layers) == 560
    updates = [LowRank(torch.randn(16, ins).half(), torch.randn(outs, 16).half(), 1.0) for outs, ins in layers]
    start = time.process_time(); [update.energy() for update in updates]
    assert time.process_time() - start < 1
    start = time.process_time(); [update.abs_sum() for update in updates[::20]]
    assert time.process_time() - start < 10/2/20
    start = time.process_time(); [update.top_sum(256) for update in updates[::20]]
    assert time.process_time() - start < 30/2/20


def test_threads_are_given_back():
    "The sums run on one thread and leave the setting as it was, also after an error."
    before = torch.get_num_threads()
    update = LowRank(*pair(), 1.0)
    update.energy(), update.abs_sum(), update.top_sum(3)
    with pytest.raises(ValueError): update.top_sum(0)
    with pytest.raises(RuntimeError): LowRank(torch.ones(2, 3), torch.ones(4, 3), 1.0).abs_sum()
    assert torch.get_num_threads() == before


# what is used, what is not

def test_unused_is_named():
    "Embeddings, T5 layers and layers the network does not have are listed, the rest is read."
    attn = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = state(f"lora_unet_{attn.replace('.', '_')}", "lora_unet_down_blocks_9_attn_to_q", ends=("lora_down.weight", "lora_up.weight"), ins=768, outs=320)
    tensors |= {"bundle_emb.sks.string_to_param": torch.ones(1, 768)} | state("lora_te2_encoder_block_0_layer_0_SelfAttention_q", ends=("lora_down.weight", "lora_up.weight"))
    lora = read_lora(tensors)
    assert list(lora.layers) == [f"unet.{attn}"] and lora.family == "sd1"
    reasons = {left.key: left.reason for left in lora.report.unused}
    assert len(reasons) == 5 and set(reasons) | {f"lora_unet_{attn.replace('.', '_')}.{end}.weight" for end in ("lora_down", "lora_up")} == set(tensors)
    assert "T5" in reasons["lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight"]
    good = [f"unet.{name}" for name in ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v")]
    lora = read_lora(state(*good, "unet.motion.to_k", ins=768, outs=320))
    assert list(lora.layers) == good and {left.key for left in lora.report.unused} == {"unet.motion.to_k.lora_A.weight", "unet.motion.to_k.lora_B.weight"}


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
REFUSED = {
    "DoRA": state(Q) | {f"{Q}.dora_scale": torch.ones(8, 1)}, "DoRA ": state(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(8)},
    "IA3": {"lora_unet_x.on_input": torch.tensor(True).float(), "lora_unet_x.weight": torch.ones(3)}, "OFT": {"lora_unet_x.oft_blocks": torch.ones(2, 2, 2)},
    "GLoRA": {f"lora_unet_x.{n}.weight": torch.ones(2, 2) for n in ("a1", "a2", "b1", "b2")}, "full weight difference": {"lora_unet_x.diff": torch.ones(4, 4)},
    "LoRA with biases": state(Q) | {f"{Q}.lora_B.bias": torch.ones(8)}, "VeRA": state(Q) | {f"{Q}.vera_lambda_b": torch.ones(8)},
    "Stable Diffusion 3": state("lora_unet_joint_blocks_0_context_block_attn_qkv", ends=("lora_down.weight", "lora_up.weight")),
    "Wan": state("diffusion_model.blocks.0.self_attn.q"), "Wan ": state("lora_unet_blocks_0_cross_attn_k", ends=("lora_down.weight", "lora_up.weight")),
    "Qwen-Image": state("lora_unet_transformer_blocks_40_attn_to_q", "lora_unet_transformer_blocks_1_attn_to_q", ends=("lora_down.weight", "lora_up.weight")),
    "Z-Image": state("lora_unet_layers_0_attention_to_q", ends=("lora_down.weight", "lora_up.weight")), "HunyuanVideo": state("diffusion_model.double_blocks.0.img_attn_qkv"),
    "FLUX.2": state("diffusion_model.double_stream_modulation_img.lin"), "FLUX.1's fused": state("diffusion_model.single_blocks.0.linear1", ins=16, outs=144),
    "NaN": state(Q) | {f"{Q}.lora_B.weight": torch.full((8, 2), torch.nan)}, "infinity": state(Q) | {f"{Q}.lora_A.weight": torch.full((2, 8), torch.inf).half()}, "finite": state(Q) | {f"{Q}.alpha": torch.tensor(torch.nan)},
    "ranks do not match": state(Q) | {f"{Q}.lora_B.weight": torch.ones(8, 3)}, "no partner: lora_B": {f"{Q}.lora_A.weight": torch.ones(2, 8)}, "no partner: lora_A": {f"{Q}.lora_B.weight": torch.ones(8, 2)},
    "quantised": state(Q) | {f"{Q}.lora_B.weight": torch.ones(8, 2, dtype=torch.int8)}, "alpha is one number": state(Q) | {f"{Q}.alpha": torch.ones(2)}, "empty matrix": state(Q) | {f"{Q}.lora_A.weight": torch.ones(0, 8), f"{Q}.lora_B.weight": torch.ones(8, 0)},
    "2-D convolutions": state(Q) | {f"{Q}.lora_A.weight": torch.ones(2, 8, 3), f"{Q}.lora_B.weight": torch.ones(8, 2, 1)}, "kernel must be in down": state(Q) | {f"{Q}.lora_A.weight": torch.ones(2, 8, 1, 1), f"{Q}.lora_B.weight": torch.ones(8, 2, 3, 3)},
    "two spellings": state(Q) | state("lora_" + Q.replace(".", "_"), ends=("lora_down.weight", "lora_up.weight")), "two adapters": state(Q) | state(Q, ends=("lora_A.other.weight", "lora_B.other.weight")),
    "is zero": {key: torch.zeros_like(t) for key, t in state(Q, "unet.x").items()}, "no tensor at all": {}, "whole checkpoint": {"model.diffusion_model.out.2.weight": torch.ones(3, 3), "first_stage_model.x": torch.ones(2)},
    "language model": state("base_model.model.model.layers.0.self_attn.q_proj"), "GPT": state("base_model.model.transformer.h.0.attn.c_attn"), "vision transformer or BERT": state("base_model.model.vit.encoder.layer.0.attention.attention.query"),
    "IP-Adapter": {"image_proj.proj.weight": torch.ones(3, 3), "ip_adapter.1.to_k_ip.weight": torch.ones(3, 3)}, "textual-inversion": {"emb_params": torch.ones(4, 768)}, "no LoRA in it": {"conv_in.weight": torch.ones(3, 3)},
    "has the shape": state(*[f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.{end}" for end in ("to_k", "to_v")], ins=768, outs=320) | state("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", ins=768, outs=999),
    "not a tensor": {"x.lora_A.weight": [1, 2]}, "meta device": {f"{Q}.lora_A.weight": torch.ones(2, 8, device="meta"), f"{Q}.lora_B.weight": torch.ones(8, 2)},
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_by_name(why):
    "One line that names the cause."
    with pytest.raises(LoRAError, match=re.escape(why.strip())) as error: read_lora(REFUSED[why])
    assert "\n" not in str(error.value) and str(error.value).startswith("state dict: ")


@pytest.mark.parametrize("config, why", [(dict(peft_type="IA3"), "IA3"), (dict(use_dora=True), "DoRA"), (dict(init_lora_weights="pissa_niter_4"), "base weights"), (dict(lora_bias=True), "biases"), (dict(r=4, lora_alpha=8), "do not belong together"),
                                         (dict(lora_alpha="eight", r=2), "must be a number"), ([1], "not readable JSON")])
def test_peft_settings_that_are_refused(config, why, tmp_path):
    "Settings under which the matrices do not tell the whole update."
    save_file(state(f"base_model.model.{Q[5:]}"), tmp_path/"adapter_model.safetensors")
    (tmp_path/"adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoRAError, match=why): read_lora(tmp_path)


def test_scales():
    "alpha beside the matrices wins; zero means the rank; none means the rank."
    for alpha, scale in ((1, .5), (4, 2), (0, 1), (None, 1), (-2, -1)):
        tensors = state(Q) | ({} if alpha is None else {f"{Q}.alpha": torch.tensor(alpha)})
        assert read_lora(tensors).layers[Q].scale == scale
    assert read_lora(state(Q) | {f"{Q}.alpha": 1.0}).layers[Q].scale == .5


def test_settings_of_the_header_by_component(tmp_path):
    "`transformer.…` settings hold for the transformer in whichever spelling, and not for the text encoder."
    down, up = pair(3072, 3072)
    save_file({"diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": down, "diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight": up}
              | state("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", ins=768, outs=768), tmp_path/"x.safetensors", {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 16})})
    assert [update.scale for update in read_lora(tmp_path/"x.safetensors").layers.values()] == [8.0, 1.0]


def test_metadata_never_decides_the_family(tmp_path):
    "A header that calls a FLUX file SD 1.5 is kept and not believed."
    save_file(state("transformer.single_transformer_blocks.3.proj_out", ins=15360, outs=3072), tmp_path/"x.safetensors", {"ss_base_model_version": "sd_1.5", "ss_tag_frequency": '{"1_YEW": {"YEW": 1}}'})
    lora = read_lora(tmp_path/"x.safetensors")
    assert lora.family == "flux" and lora.metadata["ss_base_model_version"] == "sd_1.5" and lora.trigger_words == ("YEW",)


def test_small_networks_read_by_name():
    "A network with shapes of its own is no error in any spelling, also where its width is a known one."
    for cross in (128, 768, 1024, 2048):
        unet = tiny_unet(cross)
        for spell in (lambda n: f"unet.{n}", lambda n: "lora_unet_" + n.replace(".", "_")):
            tensors = {f"{spell(name)}.{end}.weight": t for name, ts in unet_pairs(unet).items() for end, t in zip(("lora_down", "lora_up"), ts)}
            lora = read_lora(tensors)
            assert lora.family == "unknown" and set(lora.layers) == {f"unet.{name}" for name in unet_pairs(unet)} and not lora.report.unused


def test_shows_itself():
    "The table names family, components, ranks, energy and what was left; names are escaped."
    lora = read_lora(state(Q, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj") | {"<script>": torch.ones(2)})
    page = lora._repr_html_()
    assert "unet" in page and "text_encoder" in page and "not used: 1 tensor" in page and "<script>" not in page and "color:" not in page
    assert "1 denoiser and 1 text" in repr(lora) and "rank 2" in repr(lora.layers[Q])


# finding files

def test_sources(tmp_path, monkeypatch):
    "Folder, file name, the name diffusers would pick, several files, none, pickles, a LoRA itself."
    with pytest.raises(LoRAError, match="no .safetensors file"): read_lora(tmp_path)
    (tmp_path/"old.bin").write_bytes(b"\x80\x02}q\x00.")
    for source in (tmp_path, tmp_path/"old.bin"):
        with pytest.raises(LoRAError, match="run code|pickled code"): read_lora(source)
    save_file(state(Q), tmp_path/"a.safetensors")
    lora = read_lora(str(tmp_path))
    assert lora.name == tmp_path.name and lora.source == str(tmp_path) and read_lora(lora) is lora
    assert read_lora(tmp_path/"a.safetensors").name == "a"
    save_file(state(Q, "unet.x"), tmp_path/"b.safetensors")
    with pytest.raises(LoRAError, match="a.safetensors, b.safetensors.*weight_name="): read_lora(tmp_path)
    assert len(read_lora(tmp_path, weight_name="b.safetensors").layers) == 2
    with pytest.raises(LoRAError, match="there is no 'c.safetensors'"): read_lora(tmp_path, weight_name="c.safetensors")
    save_file(state(Q), tmp_path/"pytorch_lora_weights.safetensors")
    assert read_lora(tmp_path).name == tmp_path.name
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoRAError, match="HF_HUB_OFFLINE"): read_lora("nobody-at-all/no-such-lora")
    with pytest.raises(LoRAError, match="no such file"): read_lora("nowhere/at/all.safetensors")
    with pytest.raises(LoRAError, match="not a int"): read_lora(3)


def test_hub_cache(tmp_path, monkeypatch):
    "A repository in the cache is read offline, its adapter_config.json beside it."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, local_files_only: str(tmp_path))
    save_file(state(f"base_model.model.{Q[5:]}"), tmp_path/"adapter_model.safetensors")
    (tmp_path/"adapter_config.json").write_text(json.dumps(dict(r=2, lora_alpha=8)))
    lora = read_lora("user/dog")
    assert (lora.name, lora.source, lora.layers[Q].scale) == ("dog", "user/dog", 4.0)


def test_file_may_be_written_over(tmp_path):
    "What was read stays as it was, whatever happens to the file."
    path = tmp_path/"x.safetensors"
    save_file(state(Q), path)
    lora = read_lora(path)
    before = lora.layers[Q].up.clone()
    path.write_bytes(b"")
    assert torch.equal(lora.layers[Q].up, before)


def test_dtype_and_odd_addresses(tmp_path):
    "Factors keep the file's dtype, also where a header of odd length shifts every number."
    down, up = pair()
    header = {"a.note": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, f"{Q}.lora_A.weight": {"dtype": "F16", "shape": [2, 8], "data_offsets": [1, 33]}, f"{Q}.lora_B.weight": {"dtype": "F32", "shape": [8, 2], "data_offsets": [33, 97]}}
    text = json.dumps(header).encode()
    (tmp_path/"x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" + down.half().numpy().tobytes() + up.numpy().tobytes())
    update = read_lora(tmp_path/"x.safetensors").layers[Q]
    assert torch.equal(update.down, down.half()) and torch.equal(update.up, up)


# hostile files

def raw(header, data=b""):
    "A file from a header (text, bytes or JSON value) and data."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tell(shape=(2, 8), offsets=(0, 64), dtype="F32"): return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty": b"", "seven bytes": b"1234567", "zeros": bytes(5000), "all ones": b"\xff"*100, "zip": b"PK\x03\x04" + bytes(100), "pickle": b"\x80\x02}q\x00." + bytes(100), "html": b"<!DOCTYPE html><html>no</html>", "gguf": b"GGUF" + bytes(60),
    "giant header": struct.pack("<Q", 2**40) + b"{}", "negative header": struct.pack("<q", -1) + b"{}", "header beyond the file": struct.pack("<Q", 5000) + b"{}",
    "no JSON": raw(b"{not json"), "a list": raw([1, 2]), "a number": raw(3), "null": raw(None), "deep": raw(b"["*200_000), "deep objects": raw(b'{"a":'*100_000), "bad text": raw(b'{"\xff\xfe": 1}'), "twins": raw(b'{"a":{},"a":{}}'),
    "huge number": raw(b'{"a":{"dtype":"F32","shape":[' + b"9"*5000 + b'],"data_offsets":[0,4]}}', bytes(4)), "entry is text": raw({"x.lora_A.weight": "F32"}), "no shape": raw({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "dtype": raw({"x": tell(dtype="F4")}, bytes(64)), "dtype is a list": raw({"x": tell(dtype=["F32"])}, bytes(64)), "negative shape": raw({"x": tell((-2, -8))}, bytes(64)), "shape of floats": raw({"x": tell((2.0, 8.0))}, bytes(64)),
    "shape of truths": raw({"x": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1)), "huge shape": raw({"x": tell((2**40, 2**40))}, bytes(64)), "shape wraps around": raw({"x": tell((2**32, 2**32, 4), (0, 0))}),
    "many dimensions": raw({"x": tell((1,)*5000, (0, 4))}, bytes(4)), "negative offset": raw({"x": tell(offsets=(-64, 0))}, bytes(64)), "backwards": raw({"x": tell(offsets=(64, 0))}, bytes(64)), "beyond": raw({"x": tell(offsets=(0, 64))}, bytes(63)),
    "three offsets": raw({"x": tell(offsets=(0, 32, 64))}, bytes(64)), "infinite": raw(b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,NaN]}}', bytes(64)), "size lies": raw({"x": tell((2, 9))}, bytes(64)),
    "overlap": raw({f"{Q}.lora_A.weight": tell(), f"{Q}.lora_B.weight": tell((8, 2))}, bytes(64)), "gap": raw({"x": tell(offsets=(8, 72))}, bytes(72)), "rest": raw({"x": tell()}, bytes(99)), "metadata": raw({"__metadata__": {"a": 1}, "x": tell()}, bytes(64)),
    "metadata is text": raw({"__metadata__": "hello"}), "no tensors": raw({}), "only metadata": raw({"__metadata__": {"format": "pt"}}),
    "settings": raw({"__metadata__": {"lora_adapter_metadata": '{"unet.r": 99, "unet.lora_alpha": 1}'}, f"{Q}.lora_A.weight": tell(), f"{Q}.lora_B.weight": tell((8, 2), (64, 128))}, b"\0\0\x80?"*32),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file(kind, tmp_path):
    "A LoRAError with the file's name, at once."
    path = tmp_path/"hostile.safetensors"
    path.write_bytes(HOSTILE[kind])
    start = time.process_time()
    with pytest.raises(LoRAError) as error: read_lora(path)
    assert time.process_time() - start < 1
    assert "hostile.safetensors" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000 + len(str(path))


def test_sparse_giant_is_refused_unread(tmp_path):
    "A file of 64 GiB that takes no room on disk is refused before memory is asked for."
    size = 64 * 2**30
    head = raw({f"{Q}.lora_A.weight": tell((2, size//16), (0, size//2)), f"{Q}.lora_B.weight": tell((size//16, 2), (size//2, size))})
    with open(tmp_path/"giant.safetensors", "wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    with pytest.raises(LoRAError, match="larger than any LoRA"): read_lora(tmp_path/"giant.safetensors")


def test_cut_and_changed_files(tmp_path):
    "Every truncation is an error; a changed header is an error or still a LoRA, never anything else."
    path, good = tmp_path/"x.safetensors", tmp_path/"good.safetensors"
    save_file(state(Q, "unet.x") | {f"{Q}.alpha": torch.tensor(1.)}, good, {"instance_prompt": "sks"})
    data = good.read_bytes()
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        with pytest.raises(LoRAError): read_lora(path)
    dice, length, read = random.Random(0), 8 + struct.unpack("<Q", data[:8])[0], 0
    for _ in range(600):
        changed = bytearray(data)
        for _ in range(dice.randint(1, 4)): changed[dice.randrange(length)] = dice.choice([dice.randrange(256), *b'0123456789{}[]",:-'])
        path.write_bytes(bytes(changed))
        try: read += isinstance(read_lora(path), LoRA)
        except LoRAError: pass
    assert read < 600
