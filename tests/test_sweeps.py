"Sweeps: keys by content, kills at random points, two processes, the table, the report, the search."
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import loramix
from loramix import sweeps
from loramix.evaluate import both_metric, probe, truth_metric
from loramix.sweeps import Crew, Method, Store, as_method, base_facts, cost, leaderboard, make_cell, report, sweep

ROOT = Path(__file__).parent.parent
FEW = dict(num_inference_steps=2)
PAIRS = [("rocket", "line"), ("crab", "duotone")]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def world():
    "On one thread, as the processes started here: another number of threads sums in another order."
    threads, demo = torch.get_num_threads(), loramix.demo()
    demo.pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    yield demo
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    return sweep(["subject", "style", "direct"], PAIRS, 2, world=world, store=tmp_path_factory.mktemp("sweep")/"bench.sqlite", run=FEW, progress=False)


def content(path):
    "Everything that counts of a store: pictures and numbers by key, without times."
    db = sqlite3.connect(path)
    pictures = db.execute("select key, method, subject, style, seed, hex(png) from pictures order by key").fetchall()
    return pictures, db.execute("select * from numbers order by key, metric, name").fetchall()


def same_content(one, other):
    "The same pictures byte for byte, and the same numbers: to 1e-5, since pictures are measured in batches of other sizes where a run was broken off."
    (pictures, numbers), (want, measured) = content(one), content(other)
    assert pictures == want and [row[:3] for row in numbers] == [row[:3] for row in measured]
    assert np.allclose([row[3] for row in numbers], [row[3] for row in measured], atol=1e-5)


# Keys

def test_a_picture_is_known_by_what_decides_it(world):
    base = base_facts(world.pipe)
    key = lambda method="direct", pair=PAIRS[0], seed=0, run=FEW, base=base, batch=1, **kw: make_cell(world, method if isinstance(method, Method) else Method(method, **kw), *pair, [seed], base, run, batch).keys[seed]
    assert key() == key(label="another name") == key(Method("mine", dict(rule="direct"), make=loramix.mix))
    others = [key("est"), key(settings=dict(strengths=[1., .5])), key(pair=PAIRS[1]), key(seed=1), key(run=FEW | dict(guidance_scale=5.)), key(base=base | dict(base="x")), key(batch=4)]
    assert len({key(), *others}) == len(others) + 1


def test_an_edited_function_is_another_method(tmp_path):
    scope = dict(__name__="own")
    def method(text):
        path = tmp_path/f"own{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        exec(compile(text, str(path), "exec"), scope)
        sweeps.code_digest.cache_clear()
        return sweeps.method_facts(Method("own", make=scope["own"]))["code"]
    first = method("def own(pipe, subject, style):\n    return 1\n")
    assert method("def own(pipe, subject, style):\n    'Says one.'\n    return 1   # one\n") == first
    assert method("def own(pipe, subject, style):\n    return 2\n") != first


def test_a_rule_is_known_by_the_rule_it_calls_too():
    code = lambda **settings: sweeps.method_facts(Method("mine", settings, make=loramix.mix))["code"]
    assert code() == code(rule="est") and set(code(rule="est")) < set(code(rule="soft")) and len(code(rule="soft")) == 3
    assert len(code(rule="acfg")) == 3 and len(code(rule="klora")) == 2


def test_unknown_names_and_wrong_settings_are_told(world):
    with pytest.raises(ValueError, match="There is no method 'magic'.*est soft"): as_method("magic")
    with pytest.raises(TypeError, match="name or a Method"): as_method(loramix.mix)
    with pytest.raises(TypeError, match="plain JSON"): sweeps.method_facts(Method("est", dict(balance=torch.ones(1))))
    with pytest.raises(ValueError, match="held-out, mixed, tuning"): sweeps.find_pairs(world, "test")
    with pytest.raises(ValueError, match="label"): sweep(["est", "est"], PAIRS, 1, world=world)


# Pictures

def test_pictures_are_those_of_a_mix_alone(world, made):
    "In a sweep and outside it, in any order: the same to the bit; and the pipeline is free afterwards."
    with loramix.mix(world.pipe, world.subjects["crab"], world.styles["duotone"], rule="direct") as m:
        by_hand = m(world.prompt("crab", "duotone"), seed=1, **world.run | FEW)
    assert np.array_equal(np.array(made.picture("direct", "crab", "duotone", 1)), np.array(by_hand))
    fresh = loramix.demo().pipe.unet.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in world.pipe.unet.state_dict().items())


def test_seeds_in_one_call_are_the_same_but_for_a_level(world, made, tmp_path):
    options = dict(world=world, run=FEW, progress=False, batch=2)
    drawn = sweep(["direct"], PAIRS, 2, store=tmp_path/"a.sqlite", **options)
    gap = max(np.abs(np.array(drawn.picture("direct", *pair, seed), dtype=int) - np.array(made.picture("direct", *pair, seed))).max() for pair in PAIRS for seed in (0, 1))
    assert gap <= 2
    late = sweep(["direct"], PAIRS, [1], store=tmp_path/"b.sqlite", **options)               # whole blocks: what is missing does not matter
    assert np.array_equal(np.array(late.picture("direct", *PAIRS[0], 1)), np.array(drawn.picture("direct", *PAIRS[0], 1)))


def test_a_failing_method_leaves_the_pipeline_free(world, tmp_path):
    def broken(pipe, subject, style):
        m = loramix.mix(pipe, subject, style, rule="direct")
        return type("Broken", (), dict(__call__=lambda self, prompt, **run: 1/0, remove=lambda self: m.remove()))()
    with pytest.raises(ZeroDivisionError): sweep(["subject", Method("broken", make=broken)], PAIRS[:1], 1, world=world, store=tmp_path/"b.sqlite", run=FEW, progress=False)
    again = sweep(["subject", "direct"], PAIRS[:1], 1, world=world, store=tmp_path/"b.sqlite", run=FEW, progress=False)
    assert not again.missing() and len(again.store) == 2


def test_functions_are_given_prompt_and_run_if_they_ask(world, tmp_path):
    seen = []
    def asks(pipe, subject, style, *, prompt, run, extra):
        seen.append((prompt, run, extra))
        return loramix.mix(pipe, subject, style, rule="direct")
    sweep([Method("asks", dict(extra=3), make=asks)], PAIRS[:1], 1, world=world, store=tmp_path/"c.sqlite", run=FEW, progress=False)
    assert seen == [(world.prompt(*PAIRS[0]), world.run | FEW, 3)]


def test_again_draws_anew(world, made):
    before = made.store.facts(made.cells[0].keys.values())
    sweep(["subject", "style", "direct"], PAIRS, 2, world=world, store=made.store.path, run=FEW, progress=False, again=["subject"])
    after = made.store.facts(made.cells[0].keys.values())
    assert all(after[key]["drawn"] > before[key]["drawn"] for key in before) and len(made.store) == 12


# Kills

KILLER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import loramix
from loramix.sweeps import Store, sweep
world, path = loramix.demo(), sys.argv[1]
def draw(): return sweep(["subject", "direct", "est soft"], [("rocket", "line"), ("crab", "duotone")], 4, world=world, store=path, run=dict(num_inference_steps=1), progress=False)
draw_one = sweep(["direct"], [("rocket", "line")], 1, world=world, store=path + ".warm", run=dict(num_inference_steps=1), progress=False)
rng, counts, longest = random.Random(int(sys.argv[2])), [0], float(sys.argv[3])
for _ in range(20):
    child = os.fork()
    if child == 0:
        try: draw()
        finally: os._exit(0)
    time.sleep(rng.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    counts.append(len(Store(path)) if os.path.exists(path) else 0)
    if counts[-1] == counts[-2] < 24: longest *= 1.3     # nothing came of it: later next time, whatever the speed of the machine
print(*counts[1:])
made = draw()
print(len(made.store), len(made.missing()))
"""


def test_killed_twenty_times_at_random_points(world, tmp_path):
    "Twenty children, each killed by SIGKILL at a random moment of drawing, storing or measuring; then the rest. The same pictures and numbers as without any kill."
    (tmp_path/"killer.py").write_text(KILLER)
    start = time.perf_counter()
    whole = sweep(["subject", "direct", "est soft"], PAIRS, 4, world=world, store=tmp_path/"whole.sqlite", run=dict(num_inference_steps=1), progress=False)
    longest = (time.perf_counter() - start)/20
    result = subprocess.run([sys.executable, str(tmp_path/"killer.py"), str(tmp_path/"killed.sqlite"), "3", str(longest)], capture_output=True, text=True, timeout=900, env=ENV, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    counts, end = ([int(x) for x in line.split()] for line in result.stdout.strip().splitlines()[-2:])
    assert end == [24, 0] and counts == sorted(counts) and any(0 < count < 24 for count in counts)
    same_content(tmp_path/"killed.sqlite", tmp_path/"whole.sqlite")
    assert len(whole.store) == 24


SHARED = """
import os, signal, sys, time
import loramix, loramix.sweeps as sweeps
store, die = sys.argv[1], sys.argv[2:] == ["die"]
if die and os.environ.get("RANK") == "1":
    add = sweeps.Store.add
    def once(self, *args):
        add(self, *args)
        os.kill(os.getpid(), signal.SIGKILL)
    sweeps.Store.add = once
made = loramix.sweep(["subject", "direct"], [("rocket", "line"), ("crab", "duotone")], 2, store=store, run=dict(num_inference_steps=2), progress=False)
if made.crew.main: print("processes", made.crew.count, "missing", len(made.missing()), "rows", len(made.frame))
"""


def launch(tmp_path, *words):
    (tmp_path/"shared.py").write_text(SHARED)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29561", str(tmp_path/"shared.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENV, cwd=ROOT)


def test_two_processes_one_killed(world, tmp_path):
    "Under accelerate launch: one of two processes is killed after its first picture; launched again, the table is that of one process."
    alone = sweep(["subject", "direct"], PAIRS, 2, world=world, store=tmp_path/"alone.sqlite", run=FEW, progress=False)
    first = launch(tmp_path, tmp_path/"two.sqlite", "die")
    assert first.returncode != 0 and 1 <= len(Store(tmp_path/"two.sqlite")) < 8
    second = launch(tmp_path, tmp_path/"two.sqlite")
    assert second.returncode == 0, second.stderr[-2000:]
    assert "processes 2 missing 0 rows 8" in second.stdout
    same_content(tmp_path/"two.sqlite", tmp_path/"alone.sqlite")
    both = pd.concat([alone.leaderboard(), sweep(["subject", "direct"], PAIRS, 2, world=world, store=tmp_path/"two.sqlite", run=FEW, progress=False).leaderboard()], axis=1)
    assert np.allclose(both["p_both"].iloc[:, 0], both["p_both"].iloc[:, 1], atol=1e-5)


def test_shares_are_disjoint_and_complete():
    work = list(range(17))
    shares = [work[crew.index::crew.count] for crew in (Crew(i, 3) for i in range(3))]
    assert sorted(sum(shares, [])) == work


def test_stores_of_two_machines_come_together(world, tmp_path, made):
    stores = [sweep([method], PAIRS, 2, world=world, store=tmp_path/f"{method}.sqlite", run=FEW, progress=False).store for method in ("direct", "subject")]
    assert stores[0].merge(stores[1].path) == 4 and stores[0].merge(stores[1].path) == 0
    whole = sweep(["direct", "subject"], PAIRS, 2, world=world, store=stores[0].path, run=FEW, progress=False)
    assert len(whole.store) == 8 and not whole.missing()
    with pytest.raises(FileNotFoundError): stores[0].merge(tmp_path/"nothing.sqlite")


# Tables

def toy(gain=.2, styles=5):
    rng, rows = np.random.default_rng(0), []
    for s in range(6):
        for t in range(styles):
            for seed in range(3):
                hard = .4 + .2*np.sin(3*s) + .1*np.cos(2*t)
                for name, more in (("old", 0), ("new", gain), ("same", 0)):
                    p = np.clip(hard + more + .05*rng.normal(size=2), 0, 1)
                    rows.append(dict(method=name, subject=f"s{s}", style=f"t{t}", seed=seed, seconds=1., p_subject=p[0], p_style=p[1], p_both=p[0]*p[1]))
    return pd.DataFrame(rows)


def test_leaderboard_says_what_is_different_and_what_is_noise():
    table = leaderboard(toy(), "old")
    assert list(table.verdict[["new", "same"]]) == ["better", "no difference shown"] and table.index[0] == "new"
    assert table.p_holm["new"] < .01 < table.p_holm["same"]
    assert leaderboard(toy(), "new").verdict["old"] == "worse"
    assert set(leaderboard(toy(styles=2), "old").verdict.dropna()) == {"too few pairs"}
    means = toy().groupby("method")[["p_subject", "p_style"]].mean()
    assert table.harmonic_of_means["new"] == pytest.approx(2*means.loc["new"].prod()/means.loc["new"].sum())


def test_comparison_uses_only_what_both_have():
    frame = toy()
    part = frame[(frame.method != "new") | (frame.seed > 0)]
    assert leaderboard(part, "old").difference["new"] == pytest.approx((lambda w: (w["new"] - w["old"]).mean())(frame[frame.seed > 0].pivot(index=["subject", "style", "seed"], columns="method", values="p_both")))


def test_ceiling_is_the_product_of_the_two_alone(made):
    frame = made.frame.set_index(["method", "subject", "style", "seed"])
    want = np.mean([frame.loc[("subject", *pair, seed), "p_subject"]*frame.loc[("style", *pair, seed), "p_style"] for pair in PAIRS for seed in (0, 1)])
    assert sweeps.ceiling_line(made.frame).value == pytest.approx(want)
    with pytest.raises(ValueError, match="needs the methods"): sweeps.ceiling_line(made.frame[made.frame.method == "direct"])


def test_markdown_and_report(made, tmp_path):
    text = sweeps.markdown(made.leaderboard("direct"))
    assert text.count("\n") == 5 and "too few pairs" in text and "P(both)" in text
    page = report(made, tmp_path/"r.html", reference="direct", title="<bench>").read_text()
    assert "&lt;bench&gt;" in page and "<bench>" not in page and 'src="http' not in page and page.count("data:image/png") == 2
    assert all(m.title in page for m in made.methods)


def test_cost_is_a_ratio_to_a_merged_lora(world):
    table = cost(["direct", "subject"], *PAIRS[0], world=world, rounds=2, run=FEW)
    assert table.time_ratio["one merged LoRA"] == 1 and (table.seconds > 0).all() and (table.time_ratio_low <= table.time_ratio_high).all()
    fresh = loramix.demo().pipe.unet.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in world.pipe.unet.state_dict().items())


def test_metrics_added_later_measure_what_is_stored(world, made):
    more = sweep(["subject", "direct"], PAIRS, 2, world=world, store=made.store.path, run=FEW, progress=False, metrics=[both_metric(world), both_metric(world, probe(world), "probe_"), truth_metric(world)])
    assert {"p_both", "probe_p_both", "psnr"} <= set(more.frame.columns) and more.frame.notna().all().all() and len(more.store) == 12


# The search

def test_search_refuses_the_judge_and_shared_halves(world, tmp_path):
    options = dict(world=world, store=tmp_path/"t.sqlite", progress=False)
    space = dict(strengths=((.5, 1.5), (.5, 1.5)))
    with pytest.raises(ValueError, match="may not choose"): loramix.tune("direct", space, metric=both_metric(world), **options)
    with pytest.raises(ValueError, match="share the subjects"): loramix.tune("direct", space, pairs=[("robot", "line")], **options)
    with pytest.raises(ValueError, match="share the seeds"): loramix.tune("direct", space, seeds=[3], **options)
    assert not (tmp_path/"t.sqlite").exists()


def test_search_is_seeded_and_reports_on_what_it_never_saw(world, tmp_path):
    options = dict(pairs=[("rocket", "line")], seeds=[1000], held_out=[("swan", "night"), ("robot", "stamp")], held_out_seeds=1, world=world, run=FEW, progress=False, trials=3)
    first, second = (loramix.tune("direct", dict(strengths=((.5, 1.5), (.5, 1.5))), store=tmp_path/f"{i}.sqlite", **options) for i in range(2))
    assert first.trials == second.trials and first.trials[0]["settings"] == {} and first.sample.value >= 0
    assert {(c.subject, c.style) for c in first.sweep.cells} == {("swan", "night"), ("robot", "stamp")}
    assert "held-out" in str(first) and isinstance(first.carries_over, bool)
    frame = first.sweep.frame.pivot(index=["subject", "style", "seed"], columns="method", values="p_both")
    assert first.judged.value == pytest.approx((frame["tuned"] - frame["as it was"]).mean())


def test_bench_command(tmp_path):
    result = subprocess.run([sys.executable, "-m", "loramix.cli", "bench", "--methods", "subject", "direct", "--pairs", "rocket+line", "crab+duotone", "--seeds", "1", "--steps", "2", "--out", str(tmp_path/"bench")],
                            capture_output=True, text=True, timeout=600, env=ENV, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    assert {p.name for p in (tmp_path/"bench").iterdir()} >= {"bench.sqlite", "leaderboard.csv", "leaderboard.md", "pictures.csv", "report.html"}
    assert "P(both)" in result.stdout and len(pd.read_csv(tmp_path/"bench"/"pictures.csv")) == 2*2


def test_the_benchmarks_table_keeps_lines_that_were_not_drawn_again(world, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/"benchmarks"))
    import leaderboard as bench
    methods = [m for m in bench.METHODS if m.title in ("plain sum", "NP-LoRA")]
    draw = lambda methods, pairs=PAIRS: sweep(methods, pairs, 1, world=world, store=tmp_path/"bench.sqlite", run=FEW, progress=False)
    bench.write(dict(tuning=draw(methods)), tmp_path, "table", keep=False)
    whole = pd.read_csv(tmp_path/"table.csv").set_index("method").sort_index()
    pictures = pd.read_csv(tmp_path/"table_pictures.csv.gz")
    pd.concat([pictures, pictures.assign(method="a method that is gone")]).to_csv(tmp_path/"table_pictures.csv.gz", index=False)
    bench.write(dict(tuning=draw(methods[:1])), tmp_path, "table", keep=True)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/"table.csv").set_index("method").sort_index(), whole)
    assert "a method that is gone" not in (tmp_path/"table.md").read_text()
    bench.write({"mixed": draw(methods[:1])}, tmp_path, "table", keep=True)                    # another split: that one stays as it is
    both = pd.read_csv(tmp_path/"table.csv")
    pd.testing.assert_frame_equal(both[both.split == "tuning"].set_index("method").sort_index(), whole)
    assert both[both.split == "mixed"].method.tolist() == ["plain sum"]
    with pytest.raises(ValueError, match="other pairs or seeds"): bench.write(dict(tuning=draw(methods[:1], PAIRS[:1])), tmp_path, "table", keep=True)


def test_a_script_has_the_same_keys_as_the_module_it_is(tmp_path):
    "Run or imported, its function gives one key."
    (tmp_path/"mine.py").write_text("from loramix.sweeps import Method, method_facts\ndef draw(pipe, subject, style): return pipe\nfacts = method_facts(Method('mine', make=draw))\nprint(facts)\n")
    run = lambda *args: subprocess.run([sys.executable, *args], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=True).stdout
    said = run("mine.py")
    assert said == run("-c", "import mine") and "'mine.draw'" in said
