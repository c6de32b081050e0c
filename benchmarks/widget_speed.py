"""How fast the explorer follows a slider in a browser, on a plan of SDXL's size (560 layers × 50 steps), and what 200 moves leave behind.

    python benchmarks/widget_speed.py [--moves 50] [--slider beta]

Starts a JupyterLab of its own on 127.0.0.1 and a headless Chromium, and runs the explorer in a notebook. A move is one press of an arrow key on the slider; its time ends
when the browser has decoded the new picture and painted it. Needs Chromium, and pip install playwright jupyterlab. The machine should do nothing else."""
import argparse, json, statistics, sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent/"tests"))
import lab

LARGE = """from loramix.widgets import explore
from sized import sdxl_scores
explorer = explore(sdxl_scores(), steps=50)
explorer"""
INSIDE = """import json, statistics, time
times = []
for i in range(50):
    start = time.perf_counter()
    explorer.controls.beta.value = .3 + i/100
    times.append(1000*(time.perf_counter() - start))
print(json.dumps([statistics.median(times), max(times)]))"""
SIZE = """import gc, json, psutil
from matplotlib.figure import Figure
gc.collect()
print(json.dumps([psutil.Process().memory_info().rss, sum(issubclass(type(thing), Figure) for thing in gc.get_objects())]))"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=50, help="moves that are timed, after 20 to warm up")
    parser.add_argument("--slider", default="beta", help="beta, alpha, temperature, gamma, steps or step")
    args = parser.parse_args()
    if lab.missing(): sys.exit(f"The benchmark {lab.missing()}.")
    handle, picture = f".loramix-{args.slider} .noUi-handle", ".loramix-page"
    with tempfile.TemporaryDirectory() as folder:
        lab.write_notebook(Path(folder)/"explorer.ipynb", LARGE)
        with lab.lab(folder) as url, lab.page(1280, 900) as tab:
            lab.open_and_run(tab, url, "explorer.ipynb")
            tab.wait_for_selector(picture)
            tab.locator(handle).first.scroll_into_view_if_needed()
            lab.time_moves(tab, handle, picture, 20)
            times = lab.time_moves(tab, handle, picture, args.moves)
            before = lab.in_kernel(tab, SIZE)
            lab.time_moves(tab, handle, picture, 200)
            after, inside = lab.in_kernel(tab, SIZE), lab.in_kernel(tab, INSIDE)
    print(f"slider move -> new picture in the browser, 560 layers x 50 steps, {args.moves} moves of {args.slider}: median {statistics.median(times):.0f} ms, worst {max(times):.0f} ms")
    print(f"of which plan, drawing and PNG in the kernel (50 moves of beta): median {inside[0]:.0f} ms, worst {inside[1]:.0f} ms")
    print(f"200 moves after warm-up: the kernel's memory grew by {(after[0] - before[0])/1e6:.1f} MB, figures {before[1]} -> {after[1]}")


if __name__ == "__main__": main()
