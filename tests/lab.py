"""A JupyterLab (or a Notebook 7) of its own and a Chromium that looks at it, for the browser test and the benchmark.

    with lab(folder) as url, page() as tab: open_and_run(tab, url, "x.ipynb")

The server listens on 127.0.0.1 only, on a free port and without a token, and keeps all its settings in the folder."""
import contextlib, json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

APPS = dict(lab=("jupyterlab", "LabApp", "lab/tree/{}?reset"), notebook=("notebook", "JupyterNotebookApp", "notebooks/{}"))       # module, its settings, where a notebook is
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def missing() -> str | None:
    "What a browser test needs and does not find here; None where all is there."
    import importlib.util
    for package in ("playwright", "jupyterlab", "ipykernel"):
        if importlib.util.find_spec(package) is None: return f"needs pip install {package}"
    return None if CHROMIUM else "needs Chromium (apt-get install chromium)"


@contextlib.contextmanager
def lab(folder, theme="JupyterLab Light", app="lab"):
    "JupyterLab over a folder, or Notebook 7; yields its address."
    folder = Path(folder)
    settings = folder/".own"/"jupyterlab_settings_dir"/"@jupyterlab"/"apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    (settings/"notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    (settings/"themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {name: str(folder/".own"/name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    module, own_settings, _ = APPS[app]
    command = [sys.executable, "-m", module, "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={folder}", f"--{own_settings}.expose_app_in_browser=True"]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with open(folder/"lab.log", "w") as log: server = subprocess.Popen(command, cwd=folder, env={**os.environ, **own, "PYTHONPATH": paths}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        _await(lambda: urllib.request.urlopen(f"{url}/api/status").status == 200, server, folder)
        yield url
    finally:
        server.terminate()
        server.wait(20)


def _await(ready, server, folder, seconds=60):
    "Until the server answers."
    end = time.monotonic() + seconds
    while True:
        try:
            if ready(): return
        except OSError:
            if server.poll() is not None or time.monotonic() > end: raise RuntimeError("Jupyter did not start:\n" + (folder/"lab.log").read_text()[-2000:])
            time.sleep(.1)


@contextlib.contextmanager
def chromium():
    "A headless Chromium."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try: yield browser
        finally: browser.close()


def new_page(browser, width=1280, height=1500, **settings):
    "A page of a browser."
    tab = browser.new_page(viewport=dict(width=width, height=height), **settings)
    tab.set_default_timeout(30_000)
    return tab


@contextlib.contextmanager
def page(width=1280, height=1500):
    "A page of a Chromium of its own."
    with chromium() as browser: yield new_page(browser, width, height)


def write_notebook(path, *cells) -> None:
    "A notebook of code cells."
    import nbformat
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    nbformat.write(notebook, path)


OPEN = "() => window.jupyterapp?.shell.currentWidget?.sessionContext"
READY = """async () => {
    const session = window.jupyterapp.shell.currentWidget.sessionContext;
    await session.ready;
    await session.session.kernel.info;
}"""


def open_and_run(tab, url, name, seconds=120, app="lab") -> None:
    "Open a notebook, choose Run All Cells in the menu once the kernel is there, and wait until the last cell has been run."
    tab.goto(f"{url}/{APPS[app][2].format(name)}")
    tab.wait_for_function(OPEN)
    tab.evaluate(READY)
    tab.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    tab.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    tab.wait_for_function("() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(prompt => /[0-9]/.test(prompt.innerText))", timeout=1000*seconds)


IN_KERNEL = """async code => {
    const run = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code});
    let said = '';
    run.onIOPub = message => {
        if (message.header.msg_type === 'stream' && message.content.name === 'stdout') said += message.content.text;
        if (message.header.msg_type === 'error') said += 'error: ' + message.content.evalue;
    };
    await run.done;
    return said;
}"""


def in_kernel(tab, code):
    "Run code in the open notebook's kernel; the JSON that it prints."
    return json.loads(tab.evaluate(IN_KERNEL, code))


# Runs in the page: resolves with the milliseconds from a key on a slider to the new picture, decoded and painted (a message that is posted in a frame arrives after its painting).
TIME_OF_MOVE = """async ([slider, image, key]) => {
    const handle = document.querySelector(slider), picture = document.querySelector(image);
    handle.focus();
    const before = picture.src, start = performance.now();
    const done = new Promise((resolve, reject) => {
        const limit = setTimeout(() => { watcher.disconnect(); reject(new Error('no new picture in 10 s')); }, 10000);
        const watcher = new MutationObserver(async () => {
            if (picture.src === before) return;
            watcher.disconnect(); clearTimeout(limit);
            await picture.decode();
            requestAnimationFrame(() => { const {port1, port2} = new MessageChannel(); port2.onmessage = () => resolve(performance.now() - start); port1.postMessage(0); });
        });
        watcher.observe(picture, {attributes: true, attributeFilter: ['src']});
    });
    handle.dispatchEvent(new KeyboardEvent('keydown', {key, code: key, keyCode: key === 'ArrowRight' ? 39 : 37, bubbles: true}));
    return done;
}"""


def time_moves(tab, slider, image, count=50) -> list:
    "Milliseconds from each of so many moves of a slider to the new picture on the screen; to and fro in runs of ten."
    return [tab.evaluate(TIME_OF_MOVE, [slider, image, "ArrowLeft" if i // 10 % 2 else "ArrowRight"]) for i in range(count)]
