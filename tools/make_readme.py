"""README.md from nbs/index.ipynb: markdown as it is, code in fences, text outputs quoted, pictures left to the links in the text.

Cells whose first line is `#| hide` are left out; of the others the `#|` lines are."""
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent


def text_output(output):
    "The text a reader sees under a cell, or None."
    if output.output_type == "stream": return output.text
    return output.get("data", {}).get("text/plain") if output.get("data", {}).get("image/png") is None else None


def code(cell):
    "A code cell as a fenced block, with its text outputs below."
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
    shown = [text.rstrip() for text in map(text_output, cell.outputs) if text]
    language = "sh" if source.startswith("!") else "python"
    blocks = [f"```{language}\n{source.replace('!', '', 1) if language == 'sh' else source}\n```"]
    return "\n\n".join(blocks + [f"```text\n{text}\n```" for text in shown])


def readme(notebook):
    "The README text of a notebook."
    cells = [cell for cell in notebook.cells if not cell.source.startswith("#| hide")]
    parts = [cell.source if cell.cell_type == "markdown" else code(cell) for cell in cells if cell.source.strip()]
    return "\n\n".join(parts).rstrip().replace("](images/", "](nbs/images/") + "\n"


if __name__ == "__main__":
    text = readme(nbformat.read(ROOT/"nbs/index.ipynb", as_version=4))
    (ROOT/"README.md").write_text(text, encoding="utf-8")
