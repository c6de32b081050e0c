"The house itself: light imports, generated files, packaging facts, the command line."
import ast, json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").rglob("*.ipynb"))
MODULES = sorted(p.stem for p in (ROOT/"loramix").glob("*.py") if p.stem not in ("__init__", "_modidx"))
ORDER = ["drawing", "diagrams", "lowrank", "files", "names", "lora", "scores", "merges", "plan", "rules", "steps", "weights", "fusion", "samplers", "export", "voices", "probes", "watching", "mixing", "testbed", "evaluate", "sweeps", "votes", "tuning", "catalog", "stage", "controls", "widgets", "cli", "report"]
LAZY = {("plan", "drawing"), ("scores", "drawing"), ("scores", "diagrams"), ("probes", "drawing"), ("probes", "diagrams"), ("lora", "drawing"), ("mixing", "widgets"), ("mixing", "report"), ("watching", "drawing")}


def python(code, **kwargs):
    "Run a line of Python in a process of its own."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **kwargs)


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_import_and_help_need_neither_torch_nor_diffusers():
    code = "import sys; {}; heavy = {{'torch', 'diffusers', 'numpy', 'matplotlib', 'transformers'}} & set(sys.modules); assert not heavy, heavy"
    for job in ("import loramix", "import loramix; dir(loramix)", "from loramix.cli import make_parser; make_parser().format_help()"):
        result = python(code.format(job))
        assert result.returncode == 0, result.stderr


def test_every_public_name_is_there():
    result = python("import loramix; missing = [n for n in loramix.__all__ if not hasattr(loramix, n)]; assert not missing, missing; assert not set(loramix.__all__) & {'lora', 'plan', 'rules'}")
    assert result.returncode == 0, result.stderr


def test_no_module_bears_a_public_name():
    import loramix
    assert not set(loramix.__all__) & set(MODULES)


def test_every_module_has_its_notebook():
    exported = {source.split("default_exp")[1].split()[0] for path in NOTEBOOKS for cell in cells(path) for source in ["".join(cell["source"])] if "#| default_exp" in source}
    assert exported == set(MODULES)


def test_imports_go_one_way():
    for module in MODULES:
        text = (ROOT/"loramix"/f"{module}.py").read_text(encoding="utf-8")
        used = set(re.findall(r"(?:from loramix\.|from \.)(\w+) import", text)) - {module}
        below = {other for other in used if other in ORDER and ORDER.index(other) > ORDER.index(module)}
        assert not {(module, other) for other in below} - LAZY, (module, below)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in notebook["metadata"]
    assert path.stat().st_size < 300_000
    assert not [output for cell in notebook["cells"] for output in cell.get("outputs", []) if output["output_type"] == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_have_cells_of_their_own(path):
    "The documentation site runs cells with imports, and these alone: other code beside them would run without what came before."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] != "code" or "#| eval: false" in lines: continue
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse("\n".join("" if line.startswith(("%", "!")) else line for line in lines)).body}
        assert len(kinds) < 2, "\n".join(lines)


def test_settings_and_project_agree():
    if sys.version_info < (3, 11): pytest.skip("tomllib came with Python 3.11")
    import tomllib
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT/"settings.ini", encoding="utf-8")
    facts, project = config["DEFAULT"], tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    assert facts["lib_name"] == project["name"] and facts["description"] == project["description"]
    assert project["requires-python"] == f">={facts['min_python']}"
    assert (ROOT/"CITATION.cff").read_text().count("version: " + __import__("loramix").__version__)


def test_readme_is_made_from_the_index():
    pytest.importorskip("nbformat")
    before = (ROOT/"README.md").read_text(encoding="utf-8")
    sys.path.insert(0, str(ROOT/"tools"))
    import nbformat
    from make_readme import readme
    assert readme(nbformat.read(ROOT/"nbs/index.ipynb", as_version=4))== before
    gate = (ROOT/".ci/run").read_text()
    for command in ("pip install . && loramix demo", "pip install -e '.[dev]' && nbdev-test --n-workers 1 && pytest -q"):
        assert command in before and command in gate


def test_what_ships_is_small_and_licensed():
    sizes = {path: path.stat().st_size for path in (ROOT/"loramix"/"data").rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 20e6
    assert not [path for path in sizes if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    notice = (ROOT/"loramix/data/NOTICE").read_text(encoding="utf-8")
    for source in ("Noto", "Fluent", "Apache", "MIT"): assert source.lower() in notice.lower()
    world = json.loads((ROOT/"loramix/data/world.json").read_text(encoding="utf-8"))
    import hashlib
    for name, digest in world["files"].items(): assert hashlib.sha256((ROOT/"loramix/data"/name).read_bytes()).hexdigest() == digest, name


def loramix(*words, cwd):
    "Run the command line in a process of its own."
    return subprocess.run([sys.executable, "-m", "loramix.cli", *words], capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, "LORAMIX_CACHE": str(cwd/"cache")})


def test_command_line_errors_are_one_line(tmp_path):
    (tmp_path/"broken.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    for words in (["inspect", "missing.safetensors"], ["inspect", "broken.safetensors"], ["demo", "--subject", "unicorn"], ["mix", "--base", "nowhere/at-all", "--subject", "a", "--style", "b", "--prompt", "c"]):
        result = loramix(*words, cwd=tmp_path)
        assert result.returncode == 2, (words, result)
        said = [line for line in result.stderr.splitlines() if line.startswith("loramix: ")]
        assert len(said) == 1 and "Traceback" not in result.stderr, result.stderr


def test_demo_command_without_a_network(tmp_path):
    "The main job in a process whose sockets are shut."
    code = ("import socket, sys\n"
            "def shut(*args, **kwargs): raise OSError('no network in this test')\n"
            "socket.socket.connect = socket.socket.connect_ex = socket.create_connection = shut\n"
            f"from loramix.cli import main\nsys.exit(main(['demo', '--seed', '1', '--out', {str(tmp_path/'out')!r}]))")
    result = python(code, cwd=tmp_path, env={**os.environ, "LORAMIX_CACHE": str(tmp_path/"cache")})
    assert result.returncode == 0, result.stderr
    written = sorted(path.name for path in (tmp_path/"out").iterdir())
    assert len(written) == 4 and "subject" in result.stdout and "%" in result.stdout
