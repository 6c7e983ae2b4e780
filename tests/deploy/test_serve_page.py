"""The page in a real browser: drop an image and read the label."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.serving import Served, make_weights, photos, red, served

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or chromedriver is absent"
)

# A drop with a file in it, as a person's mouse makes it.
DROP = """
const bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[0]));
for (const name of ["dragover", "drop"])
  document.getElementById("drop").dispatchEvent(
    new DragEvent(name, {bubbles: true, cancelable: true, dataTransfer: transfer}));
"""
PASTE = """
const bytes = Uint8Array.from(atob(arguments[1]), c => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[0]));
document.dispatchEvent(new ClipboardEvent("paste", {bubbles: true, clipboardData: transfer}));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    camera = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", *camera):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


SLOW = [pytest.param(task, marks=pytest.mark.slow) for task in ("detect", "segment")]


@pytest.fixture(scope="module", params=["classify", *SLOW])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Served]]:
    weights = make_weights(tmp_path_factory.mktemp("page") / "w.safetensors", request.param)
    token = weights.with_suffix(".token")
    token.write_text("s3cret\n")
    guarded = ("--token-file", str(token)) if request.param != "detect" else ()
    with served(weights, "--replicas", "1", *guarded) as one:
        yield request.param, one


def wait(browser: Any, script: str) -> Any:
    """Return what a script does, once that is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda b: b.execute_script(f"return {script}"))


def give(browser: Any, how: str, name: str, content: bytes) -> None:
    browser.execute_script(how, name, base64.b64encode(content).decode())


def test_a_person_drops_pastes_and_photographs(browser: Any, service: tuple[str, Served]) -> None:
    task, running = service
    browser.get(running.url)
    if running.told["token"]:
        field = wait(
            browser,
            "document.getElementById('token').offsetParent && document.getElementById('token')",
        )
        field.send_keys("s3cret")
        field.submit()
    wait(browser, f"document.getElementById('about').textContent.includes('{task}')")
    give(browser, DROP, "china.jpg", photos()["china.jpg"])
    answer = wait(
        browser,
        "document.querySelector('.answer') && document.querySelector('.answer').textContent",
    )
    if task == "classify":
        assert answer in ("ant", "bee", "wasp", "蟻", "fly") or not answer.isprintable()
    assert wait(browser, "document.querySelectorAll('.row').length") >= 1
    assert wait(browser, "document.querySelector('.result canvas').width") == 640
    give(browser, PASTE, "small.webp", photos()["small.webp"])
    wait(browser, "document.querySelector('.result h2').textContent === 'small.webp'")
    give(browser, DROP, "broken.png", red()[:60])
    wait(browser, "document.querySelector('#error').textContent.startsWith('broken.png: ')")
    assert not wait(browser, "[document.querySelector('.result')]")[0]
    browser.execute_script("document.getElementById('open-camera').click()")
    wait(browser, "!document.getElementById('camera').hidden")
    browser.execute_script("document.getElementById('shoot').click()")
    wait(browser, "document.querySelector('.result h2')?.textContent === 'camera.jpg'")
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert all(" 422 " in line or " 401 " in line for line in said), said


def test_it_fits_a_phone(browser: Any, service: tuple[str, Served]) -> None:
    """At 360 px nothing scrolls sideways, and a finger hits what can be tapped."""
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        browser.get(service[1].url)
        browser.execute_script("sessionStorage.setItem('token', 's3cret')")
        browser.refresh()
        give(browser, DROP, "x" * 150 + ".jpg", photos()["china.jpg"])
        wait(
            browser, "document.querySelector('.result') || !document.getElementById('error').hidden"
        )
        assert wait(browser, "document.documentElement.scrollWidth") == 360
        small = """[...document.querySelectorAll("button, .button, input:not(#files), a")].filter(
          one => one.offsetParent && one.getBoundingClientRect().height < 44)"""
        assert not browser.execute_script(f"return {small}.map(one => one.outerHTML)")
        accepts = "return document.getElementById('files').accept"
        assert browser.execute_script(accepts) == "image/*"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
