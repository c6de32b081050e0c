"""Stage: write the index, the truth pictures and the notice; check what ships."""
import hashlib

import data
import world
from common import OUT, log, to_picture, write_json

BUDGET = 20e6
PROMPT = "a {subject}, {style}"


def subjects(steps):
    half = world.halves()
    return {name: dict(file=f"loras/subjects/{name}.safetensors", phrase=world.phrase(name), word=name, **world.settings(name, steps),
                       half=half[name]) for name in world.SUBJECTS}


def styles(steps):
    half = world.halves()
    return {name: dict(file=f"loras/styles/{name}.safetensors", phrase=world.STYLE_PHRASE, word=name,
                       kind="drawn" if name in world.DRAWN else "procedural", aligned=True, **world.settings(name, steps),
                       half=half[name]) for name in world.STYLES}


def judge_prompts():
    """Zero-shot classification: fill the template with every word; softmax of logit_scale × cosine gives the probabilities."""
    return dict(subject=dict(template="a {subject}", words=sorted([*world.SUBJECTS, *world.KNOWN])),
                style=dict(template="a picture, {style} style", words=sorted([*world.STYLES, *world.LEFT_OUT, *world.KNOWN_STYLES])),
                both=dict(template="a {subject}, {style} style"))


def neutral_prompts():
    """The captions that the LoRAs were trained with."""
    return dict(subject=["a {subject}", "a {subject}, flat style", "a {subject}, flat style, on {ground}"],
                style=["a {known}, szn style", "a {known} {noun}, szn style", "a {noun}, szn style", "a {known}, szn style, on {ground}"],
                base=["a {known}, {style}", "a {known} {noun}, {style}", "a {noun}, {style}", "a {known}, {style}, on {ground}", ""])


def index():
    """world.json without the checksums."""
    from loras import STYLE_STEPS, SUBJECT_STEPS
    return dict(version=1, size=data.SIZE, steps=20, guidance_scale=3.0, pipeline="pipeline", probe_encoder="pipeline/probe_encoder",
                judge="judge", subjects=subjects(SUBJECT_STEPS), styles=styles(STYLE_STEPS), prompt=PROMPT,
                neutral_prompts=neutral_prompts(), known_subjects=sorted(world.KNOWN), known_nouns={k: v[1] for k, v in world.KNOWN.items()},
                known_styles=sorted(world.KNOWN_STYLES), grounds={k: list(v) for k, v in world.GROUNDS.items()},
                judge_prompts=judge_prompts(), pairs=world.pairs(), split_reason=world.SPLIT_REASON)


def truths():
    """Every subject in every style and in flat, centred on white."""
    (OUT / "truth").mkdir(parents=True, exist_ok=True)
    for subject in world.SUBJECTS:
        for style in ["flat", *world.STYLES]:
            to_picture(data.truth(subject, style)).save(OUT / "truth" / f"{subject}__{style}.png", optimize=True)


def checksums():
    files = sorted(p for p in OUT.rglob("*") if p.is_file() and p.name != "world.json" and p.suffix != ".py" and "__pycache__" not in p.parts)
    return {p.relative_to(OUT).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def open_up():
    """Let everyone read every file."""
    for path in OUT.rglob("*"):
        if path.suffix == ".safetensors":
            path.chmod(0o644)


def main():
    data.fetch()
    open_up()
    truths()
    write_json(OUT / "world.json", index() | dict(files=checksums()))
    sizes = {part: sum(p.stat().st_size for p in (OUT / part).rglob("*") if p.is_file()) for part in ("pipeline", "judge", "loras", "truth")}
    log("export", " ".join(f"{part} {size / 1e6:.2f} MB" for part, size in sizes.items()))
    assert sum(sizes.values()) < BUDGET, f"the data is {sum(sizes.values())} bytes, over {BUDGET}"


if __name__ == "__main__":
    main()
