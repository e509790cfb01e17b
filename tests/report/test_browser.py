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
WIDTHS = (390, 1280)
WIDER = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
# What may be scrolled by itself is not an overflow of the page.
OVERFLOW = f"document.documentElement.scrollWidth > innerWidth ? {WIDER}.slice(0, 3).map(e => e.outerHTML) : []"


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
    context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: wrong.extend([request.url] if request.url != path.as_uri() else []))
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(path.as_uri())
        for media in ("screen", "print"):
            page.emulate_media(media=media)  # type: ignore[arg-type]
            wrong += [f"at {width}, {media}: {element[:200]}" for element in page.evaluate(OVERFLOW)]
    context.close()
    return wrong


@needs_browser
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("<img src='https://example.org/x.png'>", "https://example.org/x.png"),
        ("<script>console.error('lost')</script>", "console: lost"),
        ("<script>nothing()</script>", "error: nothing is not defined"),
        ("<p style='width: 2000px'>wide</p>", "at 390, screen: <p style"),
    ],
)
def test_faults_are_seen(browser: Browser, fault: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    path.write_text(html(forecasts.EVERY[0]()).replace("</body>", f"{fault}</body>"), encoding="utf-8")
    assert any(told in found for found in wrong_with(browser, path, "light"))
