"""The page: small, alone, well formed, and what it says of the forecast."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tests import forecasts
from whalepy.planner.forecast import Alternative, Forecast, ModulePart, Span
from whalepy.report.page import html

Make = Callable[[], Forecast]
every = pytest.mark.parametrize("make", forecasts.EVERY)
VOID = {"meta", "link", "br", "path", "rect"}  # without an end tag; paths and rectangles end themselves


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text; fails on tags that do not pair."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@every
def test_it_is_well_formed_small_and_alone(make: Make) -> None:
    source = html(make())
    page = Page(source)
    assert len(source.encode()) < 100_000
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    fetched = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert fetched == ["data:,"]  # an icon, so that none is asked for
    assert not re.search(r"https?://|url\(|@import|//[a-z]", source)


@every
def test_what_it_says(make: Make) -> None:
    forecast = make()
    text = Page(html(forecast)).text
    wanted = [forecast.subject.model, forecast.strategy, *forecast.assumptions, *forecast.ways_out, forecast.fidelity]
    wanted += [each.strategy for each in forecast.alternatives]
    wanted += [link.name for link in forecast.links]
    for piece in wanted:
        assert piece in text
    assert ("Annotations" in text) == bool(forecast.annotations)
    assert ("cut inside" in text) == any(part.split for part in forecast.modules)
    assert "bottleneck" in text
    assert "tightest" in text


def test_figures() -> None:
    text = Page(html(forecasts.four_cards())).text
    for piece in (
        "FITS, TIGHT replicate 24:24:8:8, zero 3, recompute selective",
        "1.24 B parameters, all trainable · AdamW, fp16 · 64 x 2,048 tokens a step",
        "step 3.42 s throughput 38,325 tokens/s of the peak rate 41 %",
        "Equal shares run out of memory on 2, 3 by 3.1 GiB.",
        "Room left: batch 64 -> 72 or sequence 2,048 -> 2,304.",
        "zero 3: not runnable yet",
        "activations of model.layers.* 3.9 GiB 40 %",
        "2 others 401.4 MiB 4.0 %",
        "weight:0 of 2,048 cut 24:24:8:8",
        "inside node 0 22.2 GB 15.8 GB 41 %",
    ):
        assert piece in text


def test_a_sixth_holder_is_one_other() -> None:
    known = forecasts.four_cards()
    first = replace(known.devices[3], held=known.devices[3].held[:6])
    assert "1 other 4" in Page(html(replace(known, devices=(*known.devices[:3], first)))).text


def test_where_nothing_fits() -> None:
    text = Page(html(forecasts.nothing_fits())).text
    assert "It runs out of memory on 0-3 by up to 14.4 GiB." in text
    assert "step, if it fitted 3.30 s" in text
    assert "torchrun" not in text


@every
def test_the_same_page_every_time(make: Make) -> None:
    assert html(make()) == html(make())


EVIL = """<b>"'&</title><script>alert(1)</script>\x1b[31m\ud800"""


def test_names_are_escaped() -> None:
    known = forecasts.four_cards()
    devices = tuple(
        replace(each, type=EVIL, spans=(Span(0.0, 1.0, "forward", EVIL),), held=(replace(each.held[0], name=EVIL),))
        for each in known.devices
    )
    source = html(
        replace(
            known,
            subject=replace(known.subject, model=EVIL, link=EVIL, optimizer=EVIL),
            strategy=EVIL,
            devices=devices,
            links=(replace(known.links[0], name=EVIL),),
            alternatives=tuple(replace(each, strategy=EVIL, flags=EVIL) for each in known.alternatives),
            assumptions=(EVIL,),
            modules=(ModulePart(EVIL, 1, 1, 1.0, ((EVIL, 1, (1.0,)),)),),
            annotations=EVIL,
            fidelity=EVIL,
        )
    )
    source.encode()
    page = Page(source)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "<script" not in source
    assert "\x1b" not in source
    assert page.text.count("<script>alert(1)</script>?[31m?") > 10


def test_a_line_break_stays_in_the_annotations() -> None:
    source = html(replace(forecasts.four_cards(), annotations="import whalepy\nwhalepy.annotate(model, {})\n"))
    assert "<pre>import whalepy\nwhalepy.annotate(model, {})\n</pre>" in source


def test_a_large_forecast_stays_below_a_megabyte() -> None:
    known = forecasts.sixty_four()
    kinds = ("forward", "backward", "bridge", "gradient", "optimizer")
    spans = tuple(Span(k / 2000, (k + 0.6) / 2000, kinds[k % 5], f"model.layers.{k}.mlp.up_proj") for k in range(2000))
    memory = tuple((k / 3000, k) for k in range(3000))
    devices = tuple(
        replace(each, batch_share=each.rank, type=f"type-{each.rank % 20}", spans=spans, memory=memory)
        for each in known.devices
    )
    plans = tuple(
        Alternative(f"replicate {k}, split 4, zero 2, recompute full", 1.0 + k, "fits", 0, 1, 2, {}, (), f"--split {k}")
        for k in range(5000)
    )
    modules = tuple(ModulePart(f"model.layers.{k}.mlp.up_proj", 1, 1, 1.0) for k in range(5000))
    links = tuple(replace(known.links[0], name=f"link {k}") for k in range(500))
    source = html(replace(known, devices=devices, alternatives=plans, modules=modules, links=links))
    text = Page(source).text
    assert len(source.encode()) < 1_000_000
    assert "The best 1,000; 4,000 more are in --json" in text
    for left in ("And 4,960 more", "And 4,000 more", "And 436 more"):  # plans, modules, links
        assert left in text


def test_it_needs_no_torch() -> None:
    code = """
import sys
import whalepy.report.as_json, whalepy.report.terminal, whalepy.report.trace
assert not {"torch", "jinja2"} & set(sys.modules)
import whalepy.report.page
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
