"""Tests the demo in a headless browser: `python benchmarks/demo_check.py --picture docs/demo.png`.

Starts `reducio-fast demo`, generates a clip side by side with the reference and takes a screenshot, cancels a second
clip, generates a third one, and submits an empty prompt. The exit status is 1 if a check fails. Needs
`pip install ".[demo]" playwright` and the system's Chromium (`--browser`), since not every machine can download one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

TIMEOUT_MS = 300_000  # milliseconds: enough for a clip on a busy machine


def start(port: int) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "reducio_fast", "demo", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/")
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.match(r"(http://\S+)", line)
    if found is None:
        server.kill()
        raise SystemExit(f"demo_check: the server printed {line!r} instead of its address")
    return server, found[1]


def wait_for_status(page: Page, pattern: str) -> None:
    status = page.locator("#status textarea")
    expect(status).to_have_value(re.compile(pattern), timeout=TIMEOUT_MS)
    page.wait_for_timeout(1000)
    expect(status).to_have_value(re.compile(pattern))  # the status must not change again
    print("status:", status.input_value())


def generate(page: Page, prompt: str, steps: int, both: bool) -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#steps input[type=number]").fill(str(steps))
    page.locator("#steps input[type=number]").press("Tab")
    page.locator("#both input").set_checked(both)
    page.locator("#generate").click()


def check(page: Page, picture: Path) -> None:
    page.goto(page.url)
    generate(page, "a red circle moving right on a black background", 8, True)
    progress = page.get_by_text(re.compile(r"step \d+ of 8"))
    expect(progress.first).to_be_visible(timeout=TIMEOUT_MS)
    print("progress:", progress.first.inner_text().strip())
    for name in ("#fast video", "#reference video"):
        expect(page.locator(name)).to_have_count(1, timeout=TIMEOUT_MS)
        page.wait_for_function("name => document.querySelector(name).readyState >= 2", arg=name, timeout=TIMEOUT_MS)
    wait_for_status(page, "^Same seed")
    sizes = page.evaluate("() => [...document.querySelectorAll('video')].map(v => [v.videoWidth, v.videoHeight])")
    assert sizes == [[128, 128], [128, 128]], sizes
    page.screenshot(path=picture, full_page=True)

    generate(page, "a blue star growing on a gray background", 50, False)
    expect(page.get_by_text(re.compile(r"step \d+ of 50")).first).to_be_visible(timeout=TIMEOUT_MS)
    page.locator("#cancel").click()
    wait_for_status(page, "^Cancelled")

    generate(page, "a blue star growing on a gray background", 2, False)
    wait_for_status(page, r"^fast: [\d.]+ s\.$")

    generate(page, " ", 2, False)  # an empty prompt shows our error message on the page
    expect(page.get_by_text("describe the clip").first).to_be_visible(timeout=TIMEOUT_MS)
    print("error message: shown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, required=True, help=".png file of the screenshot")
    parser.add_argument("--port", type=int, default=7861)
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    args = parser.parse_args()
    server, url = start(args.port)
    flags = ["--no-sandbox", "--disable-background-networking", "--autoplay-policy=no-user-gesture-required"]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.browser, headless=True, args=flags)
            page = browser.new_page(viewport={"width": 1100, "height": 1000})
            page.goto(url)
            begin = time.perf_counter()
            check(page, args.picture)
            print(f"demo_check: all right after {time.perf_counter() - begin:.0f} s")
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
