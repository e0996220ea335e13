"""The page in a browser: a click finds a trial's pictures, nothing is complained of, no request leaves the page."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rltune.report.pictures import BUDGET
from rltune.report.write import write_report
from tests.report.synthetic import FOUR, asked, color_of, write_synthetic

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

NO_BROWSER = "no chromium with chromedriver on this machine"
MEAN_COLOR = """
const [id, done] = arguments;
const tiles = document.querySelector(`.tiles[data-of="${id}"]`);
const image = new Image();
image.onload = () => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  canvas.getContext("2d").drawImage(image, 0, 0, 1, 1);
  done([...canvas.getContext("2d").getImageData(0, 0, 1, 1).data].slice(0, 3));
};
image.src = getComputedStyle(tiles).getPropertyValue("--sheet").slice(4, -1);
"""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Chrome]":
    """Headless Chromium that keeps what its console and its network say."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip(NO_BROWSER)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


def complaints(browser: "Chrome") -> list[str]:
    return [str(entry["message"]) for entry in browser.get_log("browser")]  # type: ignore[no-untyped-call]


def requests(browser: "Chrome") -> list[str]:
    """Addresses that pages have asked for since the last call; pictures that are in the page are none."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    sent = [row["params"]["request"]["url"] for row in messages if row["method"] == "Network.requestWillBeSent"]
    return [address for address in sent if not address.startswith("data:")]


def css(browser: "Chrome", selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


@pytest.mark.long
def test_a_click_on_a_point_shows_its_pictures_beside_the_base_models(browser: "Chrome", tmp_path: Path) -> None:
    wanted = asked(12, FOUR[:3], prompts=["</script><b>", "two", "three", "four"])
    page = write_report(write_synthetic(tmp_path / "mix", wanted), wanted).as_uri()
    requests(browser)
    browser.get(page)
    panel = css(browser, "#trial")[0]
    point = css(browser, "#figure-front-brightness-smoothness circle[data-t]:not(.on)")[0]
    trial = point.get_attribute("data-t")
    browser.execute_script(
        "arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", point
    )  # where points lie on one another, a click by place would find another
    assert panel.get_attribute("data-shown") == trial
    assert [prompt.text for prompt in css(browser, ".prompt p")][:2] == ["</script><b>", "two"]
    assert len(css(browser, f'#pictures .tiles[data-of="{trial}"] .tile')) == 8
    for id in ("000", trial):
        color = browser.execute_async_script(MEAN_COLOR, id)
        assert color == pytest.approx(color_of(id), abs=4), id
    assert css(browser, "#export pre")[0].text.endswith(f"--pick {trial}")
    assert len(css(browser, "#curves svg")) == 2
    assert css(browser, f'circle.on[data-t="{trial}"]')

    browser.execute_script(
        "const list = document.getElementById('which'); list.value = '003'; list.dispatchEvent(new Event('change'))"
    )
    assert panel.get_attribute("data-shown") == "003"
    browser.execute_script("document.getElementById('all').open = true")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    assert len(css(browser, "#rows tbody tr")) == 13

    for width in (390, 1280):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for scheme, paper in {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 29)"}.items():
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == paper
    assert complaints(browser) == []
    assert requests(browser) == [page]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a thousand trials."""
    wanted = asked(1000, FOUR[:2])
    folder = write_synthetic(tmp_path_factory.mktemp("thousand") / "mix", wanted, with_pictures=False)
    return write_report(folder, wanted)


@pytest.mark.slow
def test_a_thousand_trials_leave_room_for_their_pictures(thousand: Path) -> None:
    size = thousand.stat().st_size
    assert 1_000_000 < size < 10_000_000 - BUDGET


@pytest.mark.slow
def test_a_thousand_trials_are_soon_there(browser: "Chrome", thousand: Path) -> None:
    assert cpu_s(browser, thousand) < 2.0


@pytest.mark.long
def test_four_objectives_are_soon_there(browser: "Chrome", tmp_path: Path) -> None:
    wanted = asked(60, FOUR)
    page = write_report(write_synthetic(tmp_path / "mix", wanted, with_pictures=False), wanted)
    assert cpu_s(browser, page) < 2.0
    assert len(css(browser, "[id^=figure-front-] > svg")) == 6


def cpu_s(browser: "Chrome", page: Path) -> float:
    """Seconds of the page's main thread until it is drawn, whatever runs beside it."""
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.get(page.as_uri())
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    browser.execute_cdp_cmd("Performance.disable", {})
    assert complaints(browser) == []
    return float(next(row["value"] for row in metrics if row["name"] == "TaskDuration"))
