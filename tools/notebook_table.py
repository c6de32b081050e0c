"""Every notebook on one table: cells, sections, words of text, exported lines, words per exported line, figures, figures per section.

    python tools/notebook_table.py [--time]     # --time runs each in a fresh process, as nbdev-test does, and adds the seconds

A figure is an output that holds a picture; a section begins with a heading of level two or more."""
import subprocess
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent


def facts(notebook):
    "The counts of one notebook."
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    exported = sum(sum(bool(line.strip()) and not line.startswith("#|") for line in cell.source.splitlines()) for cell in code if cell.source.startswith("#| export"))
    figures = sum(any(mime.startswith("image/") for mime in output.get("data", {})) for cell in code for output in cell.outputs)
    sections = sum(line.startswith("##") for source in text for line in source.splitlines())
    return dict(cells=len(notebook.cells), sections=sections, words=sum(len(source.split()) for source in text), exported=exported, figures=figures)


def seconds(path):
    "How long the notebook takes, top to bottom, in a process of its own; 'fails' where it does not pass."
    start = time.perf_counter()
    done = subprocess.run(["nbdev-test", str(path), "--n-workers", "1"], cwd=ROOT, capture_output=True, text=True)
    return f"{time.perf_counter() - start:.0f}" if done.returncode == 0 else "fails"


def main(timed):
    print("| notebook | cells | sections | words | exported lines | words per exported line | figures | figures per section |" + (" seconds |" if timed else ""))
    print("|---" + "|---"*(7 + timed) + "|")
    for path in sorted((ROOT/"nbs").glob("*.ipynb")) + sorted((ROOT/"nbs/tutorials").glob("*.ipynb")):
        f = facts(nbformat.read(path, as_version=4))
        ratio = f"{f['words']/f['exported']:.1f}" if f["exported"] else "–"
        line = f"| {path.relative_to(ROOT/'nbs').with_suffix('')} | {f['cells']} | {f['sections']} | {f['words']} | {f['exported']} | {ratio} | {f['figures']} | {f['figures']/max(1, f['sections']):.1f} |"
        print(line + (f" {seconds(path)} |" if timed else ""), flush=True)


if __name__ == "__main__": main("--time" in sys.argv)
