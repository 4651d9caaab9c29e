"""Tries the demo in headless Chromium: python -m docs.demo.check [SCREENSHOTS]   (pip install playwright; chromium; npm).

Twelve digits at two angles each: the logits are JAX's to 1e-4, and the PDO-eConv network names the digit. The keyboard turns,
the pointer draws; around the circle the logits of ours move less than half as much. Prints the times of the answers.
"""

import argparse
import contextlib
import functools
import http.server
import json
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
from playwright.sync_api import sync_playwright

from docs.demo import build
from experiments.datasets import rotation


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served():
    """The address of the built demo, and its folder."""
    with tempfile.TemporaryDirectory() as folder:
        build.build(Path(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html", Path(folder)
        server.shutdown()


def opened(browser, address, **options):
    page = browser.new_page(**options)
    page.set_default_timeout(120_000)  # milliseconds; two cores may be busy with other work
    page.on("pageerror", lambda error: print(f"error on the page: {error}"))
    page.goto(address)
    page.wait_for_function("document.body.dataset.around")
    return page


def data(page, name):
    return json.loads(page.evaluate(f"document.body.dataset.{name}"))


def turned_to(page, angle):
    page.evaluate("delete document.body.dataset.logits")
    page.locator("#dial").fill(str(angle))
    page.wait_for_function("document.body.dataset.logits")


def logits_agree(page, digits):
    """How many digits are recognised, the milliseconds of each answer, and how far the logits move around the circle."""
    right, milliseconds, moved = 0, [], []
    for k, digit in enumerate(digits):
        image = np.float32(digit["image"]).reshape(1, 28, 28, 1) / 255
        page.evaluate("delete document.body.dataset.around")
        page.locator("#digits button").nth(k).click()
        page.wait_for_function("document.body.dataset.around")
        moved.append(np.max(data(page, "around"), axis=1))
        for angle in (0, 130):
            turned_to(page, angle)
            expected = build.logits(rotation.rotate(image, np.array([np.pi * angle / 180])).astype(np.float32))[:, 0]
            found = np.array(data(page, "logits"))
            np.testing.assert_allclose(found, expected, atol=1e-4)
            right += int(found[0].argmax()) == digit["label"]
            milliseconds.append(data(page, "milliseconds"))
    return right, milliseconds, np.mean(moved, axis=0)


def main(screenshots: Path | None):
    with served() as (address, folder), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = opened(browser, address, viewport={"width": 1100, "height": 1300})
        first = data(page, "first")
        digits = json.loads((folder / "digits.json").read_text())
        right, milliseconds, moved = logits_agree(page, digits)
        page.locator("#dial").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#angle").inner_text() == "131°"
        page.locator("#clear").click()
        box = page.locator("#pad").bounding_box()
        page.mouse.move(box["x"] + 140, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 140, box["y"] + 220, steps=8)
        page.evaluate("delete document.body.dataset.logits")
        page.mouse.up()
        page.wait_for_function("document.body.dataset.logits")
        drawn = int(np.argmax(data(page, "logits")[0]))
        print(f"{right} of {2 * len(digits)} digits recognised, a stroke is a {drawn}; the first answer {first:.0f} ms after "
              f"the page's start, an answer takes {np.median(milliseconds):.0f} ms; around the circle the largest logit moves "
              f"by {moved[0]:.1f}, that of the plain CNN by {moved[1]:.1f}, in the mean of the digits")
        assert right >= 2 * len(digits) - 2 and drawn == 1 and moved[0] < moved[1] / 2
        if screenshots:
            screenshots.mkdir(parents=True, exist_ok=True)
            views = {"wide": ((1100, 1250), "light"), "dark": ((1100, 1250), "dark"), "phone": ((390, 1900), "light")}
            for name, ((width, height), scheme) in views.items():
                view = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
                opened(browser, f"{address}?digit=2&angle=40", **view).screenshot(path=screenshots / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("screenshots", type=Path, nargs="?")
    main(parser.parse_args().screenshots)
