"""The report in a real browser: quiet, whole, readable on a phone and in the dark, usable by keyboard."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steersman.report.html import write_report
from tests.report.test_html import EVIL
from tests.report.toy import comparison_of, exhibits_of, rows_of

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--disable-extensions", "--no-default-browser-check", "about:blank"),
)
CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = (text) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  const d = canvas.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255];
};
const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
const linear = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const luminance = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
const background = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255]);
};
const poor = [];
let looked = 0;
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const element = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || ['SCRIPT', 'STYLE'].includes(element.tagName)) continue;
  const box = element.getBoundingClientRect();
  if (!box.width || !element.checkVisibility() || element.closest('.sr, .skip')) continue;
  looked += 1;
  const style = getComputedStyle(element);
  const under = background(element);
  const text = over(rgba(element instanceof SVGElement ? style.fill : style.color), under);
  const [a, b] = [luminance(text), luminance(under)].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([walk.currentNode.data.slice(0, 40), style.color, under.join()]);
}
return [looked, poor];
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("no Chromium with chromedriver is installed here (Debian: apt-get install chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    driver.get("about:blank")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every kind of block, a failed row, and labels as long as they get."""
    folder = tmp_path_factory.mktemp("report")
    contenders = ["ddim", "heun:churn=0.5", "plms", "euler+a:a_rather_long_knob=0.123456:another_long_knob=true"]
    rows = rows_of(contenders)
    rows[0].status, rows[0].figures, rows[0].error = "failed", {}, "NaN at step 7 in " + "a_long_unbroken_name" * 20
    comparison = comparison_of(rows, contenders, folder)
    return write_report(comparison, folder / "report.html", exhibits_of(contenders))


def visit(browser: Any, path: Path, width: int = 1280, dark: bool = False) -> None:
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # no smooth scrolling under a click
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(path.as_uri())
    browser.execute_script(
        "try { localStorage.clear() } catch (e) {} document.documentElement.removeAttribute('data-theme')"
    )


def requests(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def test_it_is_quiet_and_asks_the_network_for_nothing(browser, report):
    visit(browser, report)
    for tab in browser.find_elements("css selector", "[role=tab]"):
        tab.click()
    time.sleep(0.3)
    asked = requests(browser)
    assert report.as_uri() in asked, "the log of requests does not work"
    assert [url for url in asked if url != report.as_uri() and not url.startswith("data:")] == []
    assert browser.get_log("browser") == []


def test_hostile_text_does_not_run(browser, tmp_path):
    rows = rows_of(["ddim", "plms"])
    rows[0].status, rows[0].figures, rows[0].error = "failed", {}, EVIL
    comparison = comparison_of(rows, ["ddim", "plms"], tmp_path, subject=EVIL, command=EVIL)
    visit(browser, write_report(comparison, tmp_path / "r.html"))
    assert not [url for url in requests(browser) if "evil" in url]
    assert browser.get_log("browser") == []
    assert "<script>alert('x')</script>" in browser.find_element("tag name", "body").text


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_the_page_never_scrolls_sideways(browser, report, width):
    visit(browser, report, width)
    tabs = browser.find_elements("css selector", "[role=tab]")
    assert len(tabs) == 6
    for tab in [None, *tabs]:
        if tab is not None:
            tab.click()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.body.scrollWidth") <= width


def test_wide_tables_scroll_in_their_box_on_a_phone(browser, report):
    visit(browser, report, 375)
    inner, outer = browser.execute_script(
        "const box = document.querySelector('.figures').parentElement; return [box.scrollWidth, box.clientWidth]"
    )
    assert inner > outer


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_all_text_can_be_read(browser, report, dark, width):
    visit(browser, report, width, dark)
    browser.execute_script("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    looked, poor = browser.execute_script(CONTRAST)
    assert looked > 150
    assert poor == []


def colours(browser) -> list[str]:
    return browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color, "
        "getComputedStyle(document.querySelector('svg.plot text')).fill, "
        "getComputedStyle(document.querySelector('.mark')).fill]"
    )


def test_dark_follows_the_system_and_the_button(browser, report):
    visit(browser, report, dark=False)
    light = colours(browser)
    visit(browser, report, dark=True)
    dark = colours(browser)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    button = browser.find_element("id", "theme")
    assert button.text == "Light"
    button.click()
    assert colours(browser) == light
    assert button.text == "Dark"
    browser.refresh()  # the choice is kept
    assert colours(browser) == light
    browser.find_element("id", "theme").click()
    assert colours(browser) == dark


def test_tabs_work_by_mouse_and_keyboard(browser, report):
    from selenium.webdriver.common.keys import Keys

    visit(browser, report)
    plots = browser.find_element("css selector", "[aria-labelledby=plot]")
    tabs = plots.find_elements("css selector", "[role=tab]")
    panels = plots.find_elements("css selector", "[role=tabpanel]")
    assert [t.text for t in tabs] == ["frechet", "frechet against ddim", "accuracy"]
    assert [p.is_displayed() for p in panels] == [True, False, False]
    tabs[1].click()
    assert [p.is_displayed() for p in panels] == [False, True, False]
    tabs[1].send_keys(Keys.ARROW_RIGHT)
    assert [p.is_displayed() for p in panels] == [False, False, True]
    assert browser.switch_to.active_element == tabs[2]
    assert [t.get_attribute("aria-selected") for t in tabs] == ["false", "false", "true"]
    tabs[2].send_keys(Keys.ARROW_RIGHT)
    assert panels[0].is_displayed()


def test_the_keyboard_reaches_everything_in_order(browser, report):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    visit(browser, report)
    reached = []
    for _ in range(24):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(
            browser.execute_script(
                "const e = document.activeElement; return (e.id || e.className || e.getAttribute('href'))"
            )
        )
    assert reached[0] == "skip" and reached[1] == "theme"
    assert "#again" in reached and "copy js" in reached


def test_the_copy_button_copies(browser, report):
    visit(browser, report)
    origin = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", origin)
    buttons = browser.find_elements("css selector", "#again ~ .code .copy")
    assert buttons[0].text == "Copy"
    buttons[0].click()
    time.sleep(0.2)
    assert buttons[0].text == "Copied"
    copied = browser.execute_async_script(
        "navigator.clipboard.readText().then(arguments[0], (e) => arguments[0](String(e)))"
    )
    assert copied == "steersman compare sampling --methods ddim,plms --calls 5,10,20 --seeds 8"


def test_images_are_drawn_with_hard_pixels(browser, report):
    visit(browser, report)
    images = browser.execute_script(
        "return [...document.images].filter((i) => i.checkVisibility()).map((i) => "
        "[i.complete && i.naturalWidth, i.clientWidth, getComputedStyle(i).imageRendering, i.alt.length])"
    )
    assert len(images) > 64
    for natural, shown, rendering, alt in images:
        assert natural and shown >= 24 and rendering == "pixelated" and alt > 0


def test_plots_are_drawn(browser, report):
    visit(browser, report, 375)
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg.plot')].filter((e) => e.checkVisibility()).map((e) => "
        "[e.getBoundingClientRect().width, e.getBoundingClientRect().height, e.querySelectorAll('path, use').length])"
    )
    assert len(boxes) == 3  # quality, timeline, curves; the wide ones and other tabs are hidden
    for width, height, marks in boxes:
        assert width > 250 and height > 60 and marks > 10
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('svg.plot text')].filter((e) => e.checkVisibility())"
        ".map((e) => e.getBoundingClientRect().height))"
    )
    assert smallest >= 8


def test_paper_shows_every_tab_and_no_buttons(browser, report):
    visit(browser, report, dark=True)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = browser.execute_script("return [...document.querySelectorAll('.panel')].map((e) => e.checkVisibility())")
    buttons = browser.execute_script("return [...document.querySelectorAll('button')].map((e) => e.checkVisibility())")
    background = colours(browser)[0]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert len(shown) == 6 and all(shown) and not any(buttons)
    assert background == "rgb(255, 255, 255)"


def test_without_scripts_everything_is_there(browser, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        visit_without = report.as_uri()
        browser.get(visit_without)
        panels = browser.find_elements("css selector", ".panel")
        assert len(panels) == 6 and all(p.is_displayed() for p in panels)
        assert not any(b.is_displayed() for b in browser.find_elements("tag name", "button"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
