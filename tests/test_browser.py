"""The explorer in JupyterLab and Chromium: every slider by keyboard and by mouse, Generate, no error, no memory that grows, the time of a move.

The times are printed (`pytest -rP tests/test_browser.py`) and not asserted tightly, since they depend on the machine; `benchmarks/widget_speed.py` prints them too."""
import statistics

import pytest

import lab

pytestmark = [pytest.mark.browser, pytest.mark.skipif(lab.missing() is not None, reason=f"The browser test {lab.missing()}.")]

SETUP = """import loramix
world = loramix.demo()
mix = loramix.mix(world.pipe, world.subjects["rocket"], world.styles["line"], discrepancy=.4312)
explorer = mix.explore(prompt=world.prompt("rocket", "line"), **world.run)
explorer"""
LARGE = """from loramix.widgets import explore
from sized import sdxl_scores
large = explore(sdxl_scores())
large.add_class("large")
large"""
SLIDERS = ("steps", "beta", "alpha", "gamma", "temperature", "strength0", "strength1")
PICTURE = ".loramix-explorer:not(.large) .loramix-page"


def changes(tab, act, picture=PICTURE):
    "Do something, and wait until the picture is another one."
    before = tab.locator(picture).get_attribute("src")
    act()
    tab.wait_for_function("([picture, before]) => document.querySelector(picture).src !== before", arg=[picture, before])


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    lab.write_notebook(folder/"explorer.ipynb", SETUP, LARGE)
    with lab.lab(folder) as url, lab.page() as tab:
        tab.problems = []
        tab.on("pageerror", lambda error: tab.problems.append(str(error)))
        lab.open_and_run(tab, url, "explorer.ipynb")
        tab.wait_for_selector(".large .loramix-page", timeout=60_000)
        yield tab


def no_errors(tab):
    assert tab.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr'] pre").count() == 0
    assert not tab.problems


def test_the_settings_arrive_as_they_were_given(tab):
    state = lab.in_kernel(tab, "import json; print(json.dumps([explorer.plan.rule['discrepancy'], explorer.controls.balance.value, explorer.controls.beta.value]))")
    assert state == [.4312, "energy", .43]
    assert "measured 0.431" in tab.locator(".loramix-explorer:not(.large) .loramix-beta").inner_text()


@pytest.mark.parametrize("name", (*SLIDERS, "step"))
def test_sliders_by_keyboard_and_mouse(tab, name):
    slider = tab.locator(f".loramix-explorer:not(.large) .loramix-{name}")
    handle, track = slider.locator(".noUi-handle").first, slider.locator(".noUi-base").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    strength = name.startswith("strength")                                  # strengths change the weights only: the number, not the map
    if strength:
        tab.keyboard.press("ArrowLeft")
        box = track.bounding_box()
        tab.mouse.click(box["x"] + .25*box["width"], box["y"] + box["height"]/2)
        tab.wait_for_function("n => Math.abs(parseFloat(document.querySelector(`.loramix-explorer:not(.large) .loramix-${n} .widget-readout`).innerText) - .5) < .1", arg=name)
        return no_errors(tab)
    changes(tab, lambda: tab.keyboard.press("ArrowRight"))
    box = track.bounding_box()
    def drag():
        tab.mouse.move(box["x"] + .3*box["width"], box["y"] + box["height"]/2)
        tab.mouse.down()
        tab.mouse.move(box["x"] + .6*box["width"], box["y"] + box["height"]/2, steps=5)
        tab.mouse.up()
    changes(tab, drag)
    no_errors(tab)


def test_choosing_a_layer(tab):
    explorer = tab.locator(".loramix-explorer:not(.large)")
    words = explorer.locator(".loramix-words")
    before = words.inner_text()
    track = explorer.locator(".loramix-height .noUi-base").first
    box = track.bounding_box()
    changes(tab, lambda: tab.mouse.click(box["x"] + box["width"]/2, box["y"] + .7*box["height"]))
    tab.wait_for_function("before => document.querySelector('.loramix-explorer:not(.large) .loramix-words').innerText !== before", arg=before)
    assert "Balanced by" in words.inner_text()
    changes(tab, lambda: explorer.locator(".loramix-layer select").first.select_option("mid"))
    assert "energy" in explorer.locator(".loramix-hover div[title]").first.get_attribute("title")


def test_generate_cancel_and_the_free_kernel(tab):
    run = tab.locator(".loramix-explorer:not(.large) .loramix-run")
    image, go, stop = run.locator("img"), run.locator("button").nth(0), run.locator("button").nth(1)
    go.click()
    changes(tab, lambda: tab.locator(".loramix-explorer:not(.large) .loramix-step .noUi-handle").press("ArrowLeft"))  # the kernel answers while it draws
    tab.wait_for_function("() => document.querySelector('.loramix-run').innerText.includes('Seed 0')", timeout=60_000)
    first = image.get_attribute("src")
    run.locator("input[type=number]").fill("3")
    run.locator("input[type=number]").press("Tab")
    go.click()
    tab.wait_for_function("before => document.querySelector('.loramix-run img').src !== before", arg=first, timeout=60_000)
    tab.wait_for_function("() => document.querySelector('.loramix-run').innerText.includes('Seed 3')")
    second = image.get_attribute("src")
    go.click()
    stop.click()
    tab.wait_for_function("() => document.querySelector('.loramix-run').innerText.includes('Cancelled after')", timeout=60_000)
    assert image.get_attribute("src") == second
    no_errors(tab)


def test_tray_and_code(tab):
    explorer = tab.locator(".loramix-explorer:not(.large)")
    explorer.locator(".loramix-tray button").first.click()
    explorer.locator(".loramix-tray button", has_text="Drop").wait_for()
    explorer.locator("button.loramix-copy").click()
    tab.wait_for_function("() => document.querySelector('.loramix-code textarea').value.includes('loramix.mix(')")
    explorer.locator(".loramix-tray button", has_text="Drop").click()
    explorer.locator(".loramix-tray button", has_text="Drop").wait_for(state="detached")
    no_errors(tab)


def test_time_of_a_move_and_memory_after_200(tab):
    "Slider move to new picture on a plan of SDXL's size; then 200 moves from the browser, and what the kernel has grown by."
    slider, picture = ".large .loramix-beta .noUi-handle", ".large .loramix-page"
    tab.locator(slider).scroll_into_view_if_needed()
    lab.time_moves(tab, slider, picture, 20)
    measure = "import gc, json, psutil; from matplotlib.figure import Figure; gc.collect(); print(json.dumps([psutil.Process().memory_info().rss, sum(issubclass(type(x), Figure) for x in gc.get_objects())]))"
    before = lab.in_kernel(tab, measure)
    times = lab.time_moves(tab, slider, picture, 200)
    after = lab.in_kernel(tab, measure)
    first = sorted(times[:50])
    print(f"slider move to new picture, 560 layers x 50 steps, 50 moves: median {statistics.median(first):.0f} ms, worst {first[-1]:.0f} ms")
    print(f"200 moves: kernel grew by {(after[0] - before[0])/1e6:.1f} MB, figures {before[1]} -> {after[1]}")
    assert statistics.median(first) < 2000
    assert after[0] - before[0] <= 5e6 and after[1] == before[1]
    no_errors(tab)
