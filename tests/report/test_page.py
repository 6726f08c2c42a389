"""The report: what it embeds, against the run's own files; in a browser, what each control does.

The browser is Debian's chromium; where it or selenium is missing those tests are skipped.
"""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage_rl.errors import InputError
from stage_rl.pictures import image_boxes, image_grid
from stage_rl.report import page as pages
from stage_rl.report import run_page
from stage_rl.report.page import report_page, unique_names
from stage_rl.report.series import over_seeds, read_cells

FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
)
HOSTILE = "</script><b id=broken>"
PAIRS = [("a red circle", 0.0, 1.0), ("a red circle", 1.0, 1.0), ("two stars", 1.0, 0.0)]
"""Prompt, value of the base, value of the trained policy."""


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The tiny run with a comparison, a hostile reason, and enough steps for curves."""
    folder = tmp_path_factory.mktemp("page") / "one"
    shutil.copytree(tiny_run, folder)
    images_NHWC = np.stack([np.full((48, 48, 3), 20 * i, np.uint8) for i in range(6)])
    image_grid(images_NHWC, columns=2).save(folder / "before_after.png")
    boxes = image_boxes(images_NHWC, columns=2)
    records = [
        {"prompt": prompt, "task": "x", "image": i}
        | {"base": {"value": base, "box": boxes[2 * i]}}
        | {"trained": {"value": trained, "box": boxes[2 * i + 1]}}
        for i, (prompt, base, trained) in enumerate(PAIRS)
    ]
    text = json.dumps({"measure": "gold", "images": records})
    (folder / "before_after.json").write_text(text)
    file = folder / "images" / "000001.json"
    logged = json.loads(file.read_text())
    logged[0]["reason"] = HOSTILE
    file.write_text(json.dumps(logged))
    file = folder / "images" / "000000.json"
    logged = json.loads(file.read_text())
    logged[-1] |= {"reward": None, "reason": "the reward failed"}
    file.write_text(json.dumps(logged))
    first, second = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(first), json.loads(second)]
    more = [lines[1] | {"step": n, "reward/mean": n / 7 % 1} for n in range(2, 30)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines + more))
    return folder


@pytest.fixture(scope="module")
def other(run):
    """A run of another recipe, one image of which is unlike the first run's, without fixed prompts
    and with one pair.
    """
    folder = run.parent / "two"
    shutil.copytree(run, folder)
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["optimizer"]["lr"] = 0.25
    (folder / "recipe.json").write_text(json.dumps(recipe))
    shutil.rmtree(folder / "fixed")
    pairs = json.loads((folder / "before_after.json").read_text())
    pairs["images"] = pairs["images"][:1]
    (folder / "before_after.json").write_text(json.dumps(pairs))
    logged = json.loads((folder / "images" / "000001.json").read_text())
    logged[0]["reward"] = 9.0
    (folder / "images" / "000001.json").write_text(json.dumps(logged))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two arms and three runs, and a second cell of one run."""

    def a_run(arm, seed, golds, cell="hot"):
        series = {"validation/gold": [[1, 2], golds], "probe/kl": [[1, 2], [0.01, 0.04]]}
        series["reward/mean"] = [[1, 2], golds]
        kept = {"cell": cell, "arm": arm, "seed": seed, "failed": "", "steps": 2}
        return kept | {"series": series}

    about = {"name": "s", "cells": {"hot": ["steps=2"], "cold": []}, "contrasts": []}
    about |= {"arms": {"grpo": {}, "stage": {}}, "endpoint": "validation/gold"}
    runs = [a_run("grpo", 1, [0.25, 0.5]), a_run("grpo", 2, [0.75, 1.0])]
    runs.append(a_run("stage", 1, [0.5, 0.5]))
    runs.append(a_run("stage", 1, [0.125, 0.25], "cold"))
    base = {"hot": {"validation/gold": 0.25}}
    folder = tmp_path_factory.mktemp("study")
    (folder / "results.json").write_text(json.dumps({"study": about, "base": base, "runs": runs}))
    return folder


def data_of(page):
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S)[1])


def pixels_of(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def levels_of(text):
    return np.frombuffer(base64.b64decode(text), np.uint8)


def test_images_are_cut_at_the_size_they_were_drawn_in(run):
    pair, *_ = run_page.before_after(run, budget=10**6)
    drawn = run_page.logged_steps(run, budget=10**6)
    # Of one colour, so any size will do; WebP is off by a level.
    assert pixels_of(pair["base"]["source"]).shape[0] > 8
    assert np.abs(pixels_of(pair["trained"]["source"]).astype(int) - 20).max() <= 2
    images = drawn["steps"][0]["images"]
    for image in images[:-1]:
        shown = pixels_of(image["source"])
        assert shown.shape == (48, 48, 3)
        assert shown.mean() / 255 == pytest.approx(image["reward"], abs=1e-6)  # its brightness


def test_maps_are_the_arrays_of_the_samples(run):
    drawn = run_page.logged_steps(run, budget=10**6)
    with np.load(run / "samples" / "000001.npz") as arrays:
        entropy, similarity = arrays["entropy"], arrays["similarity"]
        drift = entropy - arrays["reference_entropy"]
        codes = np.load(run / "codebook.npy").astype(float)[arrays["tokens"]]
    scales = {one["name"]: (one["low"], one["high"]) for one in drawn["maps"]}
    assert scales["drift"][0] == -scales["drift"][1]
    for name, values in (("entropy", entropy), ("similarity", similarity), ("drift", drift)):
        low, high = scales[name]
        shown = low + levels_of(drawn["steps"][1]["maps"][name]) / 255 * (high - low)
        step = (high - low) / 255
        assert shown == pytest.approx(np.clip(values, low, high).ravel(), abs=step)
    # The pairs (0, 1), (0, 2), (0, 3), (1, 2), ... of each group.
    pairs = levels_of(drawn["steps"][1]["pairs"]).reshape(2, 6, -1) / 255 * 2 - 1
    cosines = (codes[1, 1] * codes[1, 2]).sum(-1)
    assert pairs[1, 3] == pytest.approx(cosines, abs=0.01)


def test_images_take_no_more_than_their_budget(run):
    whole = run_page.before_after(run, budget=10**6)
    assert len(whole) == 3
    some = run_page.before_after(run, budget=len(json.dumps(whole)) - 1)
    assert some == [whole[0], whole[2]]


def test_a_long_run_keeps_its_first_and_its_last_step():
    assert run_page.evenly(range(101), 5) == [0, 25, 50, 75, 100]
    assert run_page.evenly([3, 4], 5) == [3, 4]
    assert run_page.evenly(range(101), 1) == [100]
    assert run_page.evenly(range(101), 0) == []


def test_a_step_is_left_out_rather_than_to_pass_the_budget(run):
    size = len(json.dumps(run_page.logged_steps(run, budget=10**6)["steps"][0]))
    for budget, steps in ((2 * size, [0, 1]), (size, [1]), (0, [])):
        found = run_page.logged_steps(run, budget=budget)
        assert [step["step"] for step in found["steps"]] == steps
        assert found["logged"] == [0, 1]  # of all of them curves have a mark


def test_long_curves_are_thinned_to_their_budget_and_the_page_says_so(run, study, monkeypatch):
    whole = data_of(report_page([run, study]))["cells"]
    monkeypatch.setattr(pages, "LEAST_POINTS", 2)
    monkeypatch.setattr(pages, "CURVE_BYTES", len(pages._json(whole)) * 3 // 4)
    text = report_page([run, study])
    thin = data_of(text)["cells"]
    assert len(pages._json(thin)) <= pages.CURVE_BYTES
    steps = thin[0]["curves"][0]["runs"][0]["steps"]
    assert steps == list(range(0, 30, steps[1]))
    assert "Every n-th step is shown of curves with more than" in text
    assert thin[1:] == whole[1:]  # the study's two points


def test_a_page_that_would_be_too_large_has_fewer_images_or_is_refused(run, monkeypatch):
    whole = report_page([run])
    step = len(pages._json(data_of(whole)["runs"][0]["images"]["steps"][0]))
    monkeypatch.setattr(pages, "MOST_BYTES", len(whole.encode()) - step)
    less = report_page([run])
    assert len(less.encode()) < pages.MOST_BYTES
    assert len(data_of(less)["runs"][0]["images"]["steps"]) == 1
    monkeypatch.setattr(pages, "MOST_BYTES", 10**6)
    with pytest.raises(InputError, match=r"1 folders need \d\.\d MB without .*; name fewer runs"):
        report_page([run])


def test_settings_that_differ_stand_side_by_side(run, other):
    runs = [run_page.about_run(folder) | {"name": folder.name} for folder in (run, other)]
    assert run_page.differences(runs) == [
        ["setting", "one", "two"],
        ["optimizer.lr", "0.05", "0.25"],
    ]
    names = unique_names([Path("a/grpo/1"), Path("a/stage/1"), Path("b/2")])
    assert names == ["grpo/1", "stage/1", "b/2"]


def test_scores_stand_with_their_paired_intervals(tmp_path):
    def side(mean):
        return {"mean": mean, "interval": None}

    summary = {"gold": {"overall": side(0.4)}}
    about = {"benchmark": "b", "images": "4", "guidance_scale": 1, "seed": 0, "dtype": "float32"}
    change = {"gold": {"overall": {"mean": 0.1, "interval": [-0.05, 0.25]}}}
    trained = about | {"summary": {"gold": {"overall": side(0.5)}}}
    found = {"base": about | {"summary": summary}, "trained": trained, "difference": change}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    (rows,) = run_page.comparison(tmp_path)["tables"]
    assert rows[1] == ["overall", "0.400", "0.500", "+0.100", "[-0.050, +0.250]"]


def test_a_report_is_one_file_below_20_mb_that_asks_for_nothing(run):
    page = report_page([run])
    assert len(page.encode()) < 20e6
    own = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert not re.findall(r'(?:src|href)="(?!#|data:)', own)
    assert HOSTILE not in page
    assert data_of(page)["runs"][0]["images"]["steps"][1]["images"][0]["reason"] == HOSTILE


def test_a_folder_of_neither_and_a_run_without_a_step_are_refused(run, tmp_path):
    with pytest.raises(InputError, match="holds neither a run nor the results of a study"):
        report_page([tmp_path])
    shutil.copy(run / "recipe.json", tmp_path)
    with pytest.raises(InputError, match="has no step yet; train it first"):
        report_page([tmp_path])


def test_a_run_without_boxes_shows_its_curves_alone(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run" / "images").glob("*.json"):
        records = [{k: v for k, v in r.items() if k != "box"} for r in json.loads(file.read_text())]
        file.write_text(json.dumps(records))
    data = data_of(report_page([tmp_path / "run"]))
    assert (data["runs"][0]["images"]["steps"], data["runs"][0]["grid"]) == ([], [])
    assert data["cells"][0]["panels"]


@pytest.mark.parametrize("name", ["images/000001.json", "images/000001.png", "samples/000001.npz"])
def test_a_damaged_file_is_named(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        report_page([tmp_path / "run"])


SAMPLES = "samples/000001.npz"


def replace_arrays(run, **arrays):
    with np.load(run / SAMPLES) as kept:
        arrays = {**kept, **arrays}
    np.savez(run / SAMPLES, **arrays)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (SAMPLES, lambda run: np.savez(run / SAMPLES, entropy=[0.5])),
        (SAMPLES, lambda run: replace_arrays(run, tokens=np.zeros((2, 4, 9)))),
        (SAMPLES, lambda run: replace_arrays(run, tokens=np.zeros(4, int))),
        (SAMPLES, lambda run: shutil.copy(run / "codebook.npy", run / SAMPLES)),
        ("codebook.npy", lambda run: np.save(run / "codebook.npy", np.zeros((1, 2)))),
        ("codebook.npy", lambda run: np.save(run / "codebook.npy", np.array(["a"]))),
    ],
)
def test_a_file_that_holds_something_else_is_named(run, tmp_path, name, damage):
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(
        InputError, match=rf"{name}: cannot be read \(.*\); restore it or remove it"
    ):
        report_page([tmp_path / "run"])


def test_a_map_that_is_not_finite_is_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with np.load(run / "samples" / "000001.npz") as arrays:
        replace_arrays(tmp_path / "run", similarity=arrays["similarity"] + np.nan)
    (one,) = data_of(report_page([tmp_path / "run"]))["runs"]
    assert ["similarity" in step["maps"] for step in one["images"]["steps"]] == [True, False]


# In a browser.


@pytest.fixture(scope="module")
def open_page(tmp_path_factory):
    """Opens a page of some folders in a browser of its own, by width and theme."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs Debian's chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.chrome.service import Service

    folder, browsers = tmp_path_factory.mktemp("browser"), []

    def start(inputs, *, width=1280, dark=False):
        file = folder / f"{len(browsers)}.html"
        file.write_text(report_page(inputs), encoding="utf-8")
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (*FLAGS, f"user-data-dir={folder / f'profile{len(browsers)}'}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        browsers.append(browser)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        browser.get(file.as_uri())
        assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"
        return browser

    yield start
    for browser in browsers:
        browser.quit()


@pytest.fixture(scope="module")
def page(open_page, run, other):
    """The report of two runs."""
    return open_page([run, other])


@pytest.fixture
def js(page):
    """A function that runs a script in the page."""
    return page.execute_script


SET = """
const control = document.getElementById(arguments[0]);
control[control.type === "checkbox" ? "checked" : "value"] = arguments[1];
control.dispatchEvent(new Event("input"));
control.dispatchEvent(new Event("change"));
"""


CHOOSE_RUN = """
const control = document.querySelector(`select.run[data-for=${arguments[0]}]`);
control.value = arguments[1];
control.dispatchEvent(new Event("change"));
"""


def test_no_error_and_no_request(page, js):
    assert page.get_log("browser") == []
    assert (
        js(
            "return performance.getEntriesByType('resource').map((x) => x.name)"
            ".filter((name) => !name.startsWith('data:'))"
        )
        == []
    )
    assert js("return document.getElementById('broken')") is None
    assert js("return [...document.images].filter((x) => !x.alt).length") == 0
    assert js("return document.images.length") > 20
    controls = "[...document.querySelectorAll('input, select')]"
    named = "(x) => x.labels.length || x.ariaLabel"
    assert js(f"return {controls}.length") > 10
    assert js(f"return {controls}.filter((x) => !({named})(x)).map((x) => x.id)") == []


def test_curves_are_the_means_that_figures_draw(js, run, other):
    (cell,) = read_cells([run, other])
    for window in (1, 10):
        js(SET, "window", window)
        for place, runs in enumerate(cell.arms.values()):
            wanted = over_seeds(runs, "reward/mean", window, base=None)
            drawn = js("return document.querySelector('.plot').data[arguments[0]]", place)
            assert drawn["x"] == [step - 1 for step, *_ in wanted]  # as in metrics.jsonl
            assert drawn["y"] == pytest.approx([mean for _, mean, *_ in wanted], abs=1e-9)


def test_a_run_can_be_left_out_and_another_metric_chosen(js):
    counted = "return document.querySelector('.plot').data.length"
    assert js(counted) == 2
    js("document.querySelectorAll('#arms input')[1].click()")
    assert js(counted) == 1
    js("document.querySelectorAll('#arms input')[1].click()")
    js(
        "const select = document.querySelector('.panel select'); select.value = arguments[0];"
        "select.dispatchEvent(new Event('change'))",
        "reward/Brightness",
    )
    label = js("return document.querySelector('.plot').getAttribute('aria-label')")
    assert label.startswith("Reward: tiny from ")
    shown = "return document.querySelector('.plot').layout.shapes.map((x) => x.x0)"
    assert js(shown) == [0, 1]
    js("data.runs[0].images.logged.push(7)")  # one whose images are not in the file
    js(SET, "marks", False)
    assert js(shown) == []
    js(SET, "marks", True)
    assert js(shown) == [0, 1, 7]


def test_the_step_is_chosen_with_the_keyboard(page, js):
    from selenium.webdriver.common.keys import Keys

    assert js("return document.getElementById('step-value').textContent") == "1"
    page.switch_to.active_element.send_keys(Keys.TAB)
    for _ in range(60):
        if js("return document.activeElement.id") == "step":
            break
        page.switch_to.active_element.send_keys(Keys.TAB)
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert js("return document.getElementById('step-value').textContent") == "0"
    alt = js("return document.querySelector('.frame img').alt")
    assert re.match(r"Image 1 of '.*', step 0, reward 0\.\d\d: ", alt)
    alts = js("return [...document.querySelectorAll('.frame img')].map((x) => x.alt)")
    assert alts[-1].endswith(", step 0, no score: the reward failed")
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)


def test_a_map_lies_over_each_image(js, run):
    js(SET, "map", "advantages")
    with np.load(run / "samples" / "000001.npz") as arrays:
        means = arrays["advantages"][0].mean(-1)
    best = means.argmax()
    js("document.querySelectorAll('.frame')[arguments[0]].focus()", int(best))
    text = js("return document.getElementById('map-value').textContent")
    assert float(re.match(r"mean (\S+), from ", text)[1]) == pytest.approx(means[best], rel=0.03)
    assert js("return document.querySelectorAll('.frame canvas').length") == 8
    js(SET, "opacity", 40)
    assert js("return document.querySelector('.frame canvas').style.opacity") == "0.4"
    js(SET, "map", "")
    assert js("return document.querySelectorAll('.frame canvas').length") == 0


def test_an_image_is_compared_with_the_others_of_its_group(js, run):
    js("document.querySelectorAll('.frame')[5].click()")
    assert js("return document.getElementById('map').value") == "pairs"
    marked = (
        "return [...document.querySelectorAll('.frame')].map((x) => !!x.querySelector('canvas'))"
    )
    assert js(marked) == [False] * 4 + [True, False, True, True]
    codes = np.load(run / "codebook.npy").astype(float)
    with np.load(run / "samples" / "000001.npz") as arrays:
        one, two = codes[arrays["tokens"][1, 1]], codes[arrays["tokens"][1, 3]]
    js("document.querySelectorAll('.frame')[7].focus()")
    text = js("return document.getElementById('map-value').textContent")
    mean = float(re.match(r"mean (\S+),", text)[1])
    assert mean == pytest.approx((one * two).sum(-1).mean(), abs=0.01)


def test_the_slider_shows_more_of_the_base(js):
    js(SET, "slide-all", 80)
    clips = js(
        "return [...document.querySelectorAll('.stack img + img')].map((x) => x.style.clipPath)"
    )
    assert clips == ["inset(0px 0px 0px 80%)"] * 3


def test_the_slider_of_a_pair_moves_that_pair_alone(js):
    js(SET, "slide-all", 80)
    js(
        "const slider = document.querySelectorAll('.pair input')[1]; slider.value = 30;"
        "slider.dispatchEvent(new Event('input'))"
    )
    clips = js(
        "return [...document.querySelectorAll('.stack img + img')].map((x) => x.style.clipPath)"
    )
    assert [clip[-4:-2] for clip in clips] == ["80", "30", "80"]


def test_each_section_shows_the_run_that_is_chosen_for_it(js):
    seen = """
return [
  document.querySelectorAll("#fixed-rows tbody tr").length,
  document.querySelector("#groups figcaption strong").textContent,
  document.getElementById("compare-count").textContent,
]
"""
    first = js(seen)
    for place, name in enumerate(("fixed", "images", "compare")):
        js(CHOOSE_RUN, name, 1)
        changed = [one != other for one, other in zip(js(seen), first, strict=True)]
        assert changed == [i == place for i in range(3)]
        js(CHOOSE_RUN, name, 0)
        assert js(seen) == first


def test_images_are_filtered_by_what_became_of_them(js):
    counted = "return document.getElementById('compare-count').textContent"
    assert js(counted) == "Of 3 images 1 gained, 1 lost, 1 unchanged."
    for kind, prompt in (("gained", "a red circle"), ("lost", "two stars")):
        js(SET, "changed", kind)
        (text,) = js("return [...document.querySelectorAll('.pair')].map((x) => x.innerText)")
        assert prompt in text
        marks = ["✗ wrong", "✓ right"]
        assert re.findall(r"[✗✓] \w+", text) == (marks if kind == "gained" else marks[::-1])


def test_the_theme_changes_page_and_curves(js):
    colours = (
        "return [getComputedStyle(document.body).backgroundColor, "
        "document.querySelector('.plot').layout.font.color]"
    )
    light = js(colours)
    js(SET, "theme", "dark")
    assert js(colours) == ["rgb(21, 23, 26)", "#e4e6ea"] != light


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("shown", ["run", "study"])
def test_a_page_scrolls_in_one_direction_in_the_theme_of_the_system(
    open_page, request, shown, width, dark, tmp_path
):
    browser = open_page([request.getfixturevalue(shown)], width=width, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.save_screenshot(str(tmp_path / "page.png"))
    with Image.open(tmp_path / "page.png") as shot:
        corner = shot.convert("L").getpixel((1, 1))
        assert shot.width == width
    assert (corner < 60) == dark
    assert browser.get_log("browser") == []


def test_a_study_shows_tables_frontier_and_bands(open_page, study):
    browser = open_page([study])
    assert browser.get_log("browser") == []
    assert "grpo" in browser.execute_script("return document.querySelector('#study').innerText")
    js = browser.execute_script
    js("window.plots = [...document.querySelectorAll('.plot')]")
    mean, low, *_ = js("return plots[1].data")
    # The base, then means and standard errors of 0.25, 0.75 and of 0.5, 1: 0.25 each.
    assert (mean["x"], mean["y"]) == ([0, 1, 2], [0.25, 0.5, 0.75])
    assert low["y"] == pytest.approx([0.25, 0.25, 0.5])
    frontier = js("return document.getElementById('frontier').data")
    assert frontier[0]["x"] == pytest.approx([0, 0.1, 0.2])
    js(SET, "bands", False)
    assert js("return plots[1].data.length") == 2
    js(SET, "cell", 1)
    assert js("return document.querySelectorAll('.plot')[1].data[0].y") == [0.125, 0.25]
    frontier = js("return document.getElementById('frontier').data")
    assert frontier[0]["x"] == pytest.approx([0.1, 0.2])  # its base is not known
