"Mix a subject LoRA and a style LoRA in one diffusion picture, without training, and see what was chosen."
__version__ = "0.1.0"

_public = dict(
    lowrank="LoRA LowRank LoRAError",
    lora="read_lora",
    scores="score Scores balance",
    merges="merge project keep_blocks",
    plan="Plan",
    rules="est soft klora topk direct switch windows acfg blora conditional_only",
    steps="FusionError",
    fusion="fuse Fusion",
    samplers="attach apply_lora composite dynamic Attached",
    export="save_lora static_lora phase_loras",
    voices="trio",
    probes="discrepancy Discrepancy",
    mixing="mix load Mix",
    testbed="demo Demo",
    widgets="explore Explorer",
    evaluate="Metric both_metric fidelity_metric truth_metric bootstrap compare",
    sweeps="sweep Sweep Method add_method leaderboard cost",
    votes="vote vote_page",
    tuning="tune",
)
_home = {name: module for module, names in _public.items() for name in names.split()}
__all__ = list(_home)


def __getattr__(name):
    "Import a public name's room when it is first asked for, so that `import loramix` itself needs neither torch nor diffusers."
    if name not in _home: raise AttributeError(f"module 'loramix' has no attribute {name!r}")
    from importlib import import_module
    value = getattr(import_module(f"loramix.{_home[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    "The public names, whether or not their rooms have been imported yet."
    return sorted([*globals(), *__all__])
