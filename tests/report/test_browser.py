"""The page in a browser: no error, no request, nothing wider than a phone or a screen, in light, dark and print."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests import forecasts
from whalepy.planner.forecast import Forecast
from whalepy.report.page import html

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SEEN = (("screen", 390), ("screen", 1280), ("print", 717))
"""Media and widths in CSS pixels: a phone, a screen, A4 within the margins that browsers leave."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield started
        started.close()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("make", forecasts.EVERY)
def test_page(browser: Browser, make: Callable[[], Forecast], scheme: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    path.write_text(html(make()), encoding="utf-8")
    assert wrong_with(browser, path, scheme) == []


def wrong_with(browser: Browser, path: Path, scheme: str) -> list[str]:
    """What a reader of the page would miss, or could be harmed by."""
    wrong: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.extend([request.url] if request.url != path.as_uri() else []))
    for media, width in SEEN:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(media=media, color_scheme=scheme)  # type: ignore[arg-type]
        page.goto(path.as_uri())
        needed = page.evaluate("document.documentElement.scrollWidth")
        wrong += [f"{media}: {needed} pixels wide, of {width}"] if needed > width else []
    context.close()
    return wrong


@needs_browser
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("<img src='https://example.org/x.png'>", "https://example.org/x.png"),
        ("<script>console.error('lost')</script>", "console: lost"),
        ("<script>nothing()</script>", "error: nothing is not defined"),
        ("<p style='width: 2000px'>wide</p>", "screen: 2"),
    ],
)
def test_faults_are_seen(browser: Browser, fault: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    path.write_text(html(forecasts.EVERY[0]()).replace("</body>", f"{fault}</body>"), encoding="utf-8")
    assert any(told in found for found in wrong_with(browser, path, "light"))
