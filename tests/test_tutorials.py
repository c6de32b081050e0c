"The lessons: each can be opened in Colab, installs the package, goes on to SDXL, shows what it did and ends with a question."
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT/"nbs"/"tutorials").glob("*.ipynb"))
REPO = "https://colab.research.google.com/github/loramix/loramix/blob/main/"


def cells(path, kind=None):
    "The cells of a lesson as (source, outputs), of one kind or all."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell.get("outputs", [])) for cell in found if kind in (None, cell["cell_type"])]


def test_lessons_are_numbered_without_gaps():
    numbers = [int(path.stem[:2]) for path in LESSONS]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 5


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request): return request.param


def test_begins_with_title_promise_and_its_own_badge(lesson):
    first = cells(lesson)[0][0].strip().split("\n")
    assert first[0].startswith("# ") and [line for line in first if line.startswith("> ")]
    badges = re.findall(r"\]\((https://colab\.research\.google\.com/[^)]*)\)", "\n".join(first))
    assert REPO + lesson.relative_to(ROOT).as_posix() in badges


def test_installs_and_goes_on_to_sdxl_in_cells_that_are_not_run_here(lesson):
    unrun = [(source, outputs) for source, outputs in cells(lesson, "code") if source.startswith("#| eval: false")]
    assert any("%pip install -q loramix" in source for source, _ in unrun)
    heading = [i for i, (source, _) in enumerate(cells(lesson)) if source.startswith("## Now on SDXL")]
    after = [source for source, _ in cells(lesson)[heading[0]:] if source.startswith("#| eval: false")]
    assert len(heading) == 1 and after
    assert not [source for source, outputs in unrun if outputs]


def test_cells_that_are_not_run_here_are_python(lesson):
    for source, _ in cells(lesson, "code"): compile("\n".join(line for line in source.split("\n") if not line.startswith("%")), lesson.stem, "exec")


def test_runs_offline(lesson):
    "Nothing that is run asks for a file of the hub or for a GPU."
    run = "\n".join(source for source, _ in cells(lesson, "code") if not source.startswith("#| eval: false"))
    assert not re.findall(r"stabilityai/|black-forest-labs/|nerijs/|CiroN2022/|\.to\(.cuda.\)|requests\.|urlopen", run)


def test_shows_pictures_and_no_error(lesson):
    outputs = [output for _, found in cells(lesson, "code") for output in found]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert not [output for output in outputs if output["output_type"] == "error" or "application/vnd.jupyter.widget-view+json" in output.get("data", {})]


def test_every_cell_that_is_run_was_run(lesson):
    "The counts of the cells rise one by one: the notebook was run from top to bottom, and its pictures belong to its code."
    found = json.loads(lesson.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in found if cell["cell_type"] == "code" and not "".join(cell["source"]).strip()]
    text = json.dumps([cell.get("outputs") for cell in found])
    assert not re.search(r"/(work|tmp|home|root)/", text)


def test_ends_with_a_picture_and_a_question(lesson):
    *before, (last, _) = cells(lesson)
    assert "question to think about" in last.lower() and "?" in last
    drawn = [outputs for source, outputs in before if not source.startswith("#| eval: false") and outputs][-1]
    assert any("image/png" in output.get("data", {}) for output in drawn)
