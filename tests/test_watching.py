"Watching a run: the same pixels, every scheduler's clean prediction, other people's callbacks, pipelines of several kinds, refusals that leave nothing behind."
import numpy as np
import pytest
import torch
from diffusers import (AutoPipelineForImage2Image, DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, EulerAncestralDiscreteScheduler,
                       EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, IPNDMScheduler, KDPM2DiscreteScheduler, LCMScheduler, LMSDiscreteScheduler, PNDMScheduler,
                       UniPCMultistepScheduler)

import tiny
from loramix import mix, read_lora
from loramix.watching import Watch, clean_prediction, decode, follow, noise_levels, unpacked, watch_sheet

SIZE = dict(height=16, width=16)
LISTENED = [DDIMScheduler, DDPMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
            HeunDiscreteScheduler, KDPM2DiscreteScheduler, LCMScheduler, LMSDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler]


def pixels(image): return np.asarray(image)


def draw(pipe, steps=5, **kwargs):
    "A picture of a fixed seed."
    return pipe("a dog in ink", num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **{**SIZE, **kwargs}).images[0]


@pytest.fixture
def pair():
    pipe = tiny.sd()
    return pipe, read_lora(tiny.lora_state(pipe, seed=1)), read_lora(tiny.lora_state(pipe, seed=2))


@pytest.mark.parametrize("make", LISTENED, ids=lambda make: make.__name__)
def test_same_pixels_and_a_prediction_for_every_step(make):
    pipe = tiny.sd()
    pipe.scheduler = make.from_config(pipe.scheduler.config)
    bare = draw(pipe)
    with follow(pipe) as heard: image = draw(pipe)
    assert (pixels(image) == pixels(bare)).all()
    assert sorted(heard.latents) == list(range(heard.total)) and heard.total == 5
    assert all(latents.shape == (1, 4, 8, 8) and torch.isfinite(latents).all() for latents in heard.latents.values())
    assert "step" not in vars(pipe.scheduler)
    ends_clean = not issubclass(make, (PNDMScheduler,))                             # these end on their last prediction; PNDM ends on a mean of several
    if ends_clean: assert np.abs(pixels(heard.pictures(image.size)[-1]).astype(int) - pixels(image)).max() <= 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("make", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
@pytest.mark.parametrize("spacing", [{}, dict(use_karras_sigmas=True)])
def test_formula_agrees_with_what_silent_schedulers_convert(make, kind, spacing):
    scheduler = make(prediction_type=kind, **spacing)
    scheduler.set_timesteps(8)
    sample, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for entry in range(8):
        scheduler._step_index = entry
        told, ours = scheduler.convert_model_output(output, sample=sample), clean_prediction(scheduler, output, entry, sample)
        if make is DEISMultistepScheduler:                                              # it converts to the noise: compare that
            alpha, sigma = noise_levels(scheduler, entry)
            ours = (sample - alpha*ours)/sigma
        assert ((told - ours).norm()/told.norm()).item() < 1e-4


def test_flux_like_pipeline_is_watched():
    pipe = tiny.flux()
    bare = draw(pipe)
    with follow(pipe, every=2) as heard: image = draw(pipe)
    assert (pixels(image) == pixels(bare)).all() and sorted(heard.latents) == [0, 2, 4]
    pictures = heard.pictures(image.size)
    assert all(picture.size == image.size for picture in pictures)
    assert np.abs(pixels(pictures[-1]).astype(int) - pixels(image)).max() <= 1     # the last step lands on its prediction
    assert np.abs(pixels(pictures[0]).astype(int) - pixels(image)).mean() > .1


def test_sdxl_in_half_precision_keeps_its_vae_half():
    pipe = tiny.sdxl()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.float16)
    seen = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    decode(pipe, torch.zeros(1, 4, 8, 8), (16, 16))
    handle.remove()
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16


def test_scales_of_other_vaes():
    pipe = tiny.sd()
    plain = decode(pipe, torch.ones(1, 4, 8, 8)*pipe.vae.config.scaling_factor, (16, 16))
    pipe.vae.register_to_config(latents_mean=[.5]*4, latents_std=[2.]*4)
    assert (pixels(decode(pipe, torch.full((1, 4, 8, 8), .25*pipe.vae.config.scaling_factor), (16, 16))) == pixels(plain)).all()


def test_image_to_image_counts_the_steps_of_the_schedule():
    pipe = AutoPipelineForImage2Image.from_pipe(tiny.sd())
    pipe.set_progress_bar_config(disable=True)
    start = draw(tiny.sd())
    run = lambda: pipe("a dog", image=start, strength=.5, num_inference_steps=6, generator=torch.Generator().manual_seed(0)).images[0]
    bare = run()
    with follow(pipe) as heard: image = run()
    assert (pixels(image) == pixels(bare)).all() and sorted(heard.latents) == [3, 4, 5]


def test_the_users_own_callback_and_failures_are_theirs(pair):
    pipe, c, s = pair
    seen = []
    def callback(pipe, step, timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"]*.9}
    with mix(pipe, c, s, discrepancy=.5) as mixed:
        image = mixed("a dog", seed=0, num_inference_steps=4, callback_on_step_end=callback, **SIZE)
        watch = mixed.watch("a dog", seed=0, num_inference_steps=4, callback_on_step_end=callback, **SIZE)
        assert (pixels(watch.image) == pixels(image)).all() and seen == [0, 1, 2, 3]*2
        def stop(pipe, step, timestep, tensors): raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): mixed.watch("a dog", seed=0, num_inference_steps=4, callback_on_step_end=stop, **SIZE)
        assert "step" not in vars(pipe.scheduler)
        assert (pixels(mixed("a dog", seed=0, num_inference_steps=4, callback_on_step_end=callback, **SIZE)) == pixels(image)).all()


def test_mix_watch_is_the_call_to_the_pixel_probing_apart(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path))
    pipe, c, s = pair
    encoder = lambda images: torch.stack([torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).flatten() - 90 for image in images])
    with mix(pipe, c, s, encoder=encoder) as mixed: image = mixed("a dog", seed=3, num_inference_steps=6, **SIZE)
    with mix(pipe, c, s, encoder=encoder) as mixed:
        watch = mixed.watch("a dog", seed=3, every=4, num_inference_steps=6, **SIZE)              # the first call: the probes are drawn, but not heard
        assert isinstance(watch, Watch) and (pixels(watch.image) == pixels(image)).all()
        assert watch.steps == (0, 4, 5) and watch.total == 6 and len(watch) == len(watch.pictures) == 3
        assert watch.image.info["loramix"] == image.info["loramix"] and watch._repr_png_()[:4] == b"\x89PNG"
        for arguments in (dict(prompt=["a", "b"]), dict(prompt="a", num_images_per_prompt=2), dict(prompt="a", output_type="np"), dict(prompt="a", return_dict=False), dict(prompt="a", every=0)):
            with pytest.raises(ValueError): mixed.watch(**arguments, seed=0, **SIZE)
        sheet = watch_sheet({"once": watch, "again": mixed.watch("a dog", seed=3, every=4, num_inference_steps=6, **SIZE)})
        assert len(sheet.axes) == 8


def test_a_new_run_starts_anew_and_others_hooks_stay():
    pipe = tiny.sd()
    own = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)              # somebody else's wrap
    theirs = pipe.scheduler.step
    with follow(pipe, every=3) as heard:
        draw(pipe, steps=4)
        draw(pipe, steps=8)
    assert sorted(heard.latents) == [0, 3, 6, 7] and pipe.scheduler.step is theirs


def test_what_cannot_be_watched_says_so_and_runs_as_before():
    pipe = tiny.sd()
    pipe.scheduler = IPNDMScheduler()
    bare = draw(pipe)
    with pytest.raises(ValueError, match="IPNDMScheduler tells no clean prediction.*DDIMScheduler"):
        with follow(pipe): draw(pipe)
    assert (pixels(draw(pipe)) == pixels(bare)).all()
    with pytest.raises(ValueError, match=r"\[1, 4, 2, 8, 8\]"): unpacked(pipe, torch.zeros(1, 4, 2, 8, 8), (16, 16))
    pipe.vae = None
    with pytest.raises(ValueError, match="pipe.vae"): follow(pipe).__enter__()
