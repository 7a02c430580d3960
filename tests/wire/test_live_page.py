"""The live page in a real Chromium, served by the real routes."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from browser import chromium, tab

from forebay_control.plan import Plan
from forebay_epp.adapters import live
from forebay_epp.adapters.live.history import History
from forebay_epp.adapters.live.report import PolicyInForce, describe
from forebay_epp.core.terms import (
    BandState,
    ControllerState,
    Dispatched,
    EndpointState,
    FlowState,
    Request,
    Shadowed,
)
from forebay_epp.traffic import Traffic

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "<img src=x onerror=\"document.title='pwned'\">"
FLOWS = (
    *(FlowState("llama", 9, 0, f"tenant-{n}") for n in range(9_999)),
    FlowState("", 50, 0, EVIL),
)
STATE = ControllerState(
    *("serving/chat", 500, 0, 8, 1.0, False),
    (
        BandState("Critical", 100, 0, 0, 0.0, 1.0, False, (), 0),
        BandState("Standard", 0, 500, 0, 12.3, 4.0, False, FLOWS, len(FLOWS)),
    ),
    (
        EndpointState("10.0.0.1:8000", "pod-1", 6, 0, 8, 2, 6, 0, 0.9, fresh=True),
        EndpointState("10.0.0.2:8000", "pod-2", 0, 0, 8, 0, 0, 0, None, True, True, "connect"),
    ),
)


class Site:
    """A server of the page, whose state a test may change, and a tab that shows it."""

    def __init__(self) -> None:
        self.state = STATE
        self._policy = PolicyInForce()
        self._policy.reconfigured(Plan("serving/chat"))
        self.traffic = Traffic()
        self._history = History(self.traffic)

    async def report(self) -> dict[str, object]:
        return describe(self.state, self._policy, self._history, None)


@pytest.fixture
async def site(tmp_path: Path):
    if chromium() is None:
        end = pytest.fail if "CI" in os.environ else pytest.skip
        end("chromium is missing; on Debian: apt-get install chromium")
    site = Site()
    app = web.Application()
    app.add_routes(live.routes(site.report))
    server = TestServer(app, host="127.0.0.1")
    await server.start_server()
    async with tab(tmp_path / "profile") as site.tab:
        await site.tab.tell("Page.navigate", url=str(server.make_url("/live")))
        await site.tab.until("document.getElementById('status')?.textContent === 'live'")
        yield site
    await server.close()


async def text(site: Site) -> str:
    return await site.tab.run("document.body.innerText")


async def test_it_shows_what_waits_where_and_why(site):
    """Bands, flows with the rest as one, slots, what is left out, the policy: all as text."""
    shown = await text(site)

    for words in (
        "Standard: 500 waiting",
        "the oldest for 12 s",
        "9,988 other flows",
        "6 of 8",
        "left out: connect",
        "FCFS between models",
    ):
        assert words in shown
    assert await site.tab.run("document.querySelectorAll('.row').length") < 40


async def test_bars_follow_the_state(site):
    """A bar is as long as its share of the longest band, and follows within an event or two."""
    width = "document.querySelector('[data-key=Critical] .fill').style.width"
    assert await site.tab.run(width) == "0%"

    critical, standard = STATE.bands
    site.state = replace(STATE, bands=(replace(critical, requests=250), standard))

    await site.tab.until(f"{width} === '50%'")


async def test_it_shows_what_a_policy_beside_the_one_in_force_would_do(site):
    """What would wait now, and by band and model what it has made of requests so far."""
    assert "would wait" not in await text(site)
    request = Request(1, "llama", 1, band="Standard", flow="llama")
    site.traffic.configure(["llama"])
    site.traffic.shadowed(Shadowed(request, Dispatched(1, "a", 4.2), overtaken=True))

    site.state = replace(STATE, shadow=STATE)

    await site.tab.until("!document.getElementById('shadow').hidden")
    shown = await text(site)
    assert "What the shadow of the policy would do" in shown
    assert "would wait now: Standard 500" in shown
    assert "Standard\tllama\t1\t4.2 s\t0\t1" in shown


async def test_names_are_text_whatever_they_contain(site):
    """A tenant's name with HTML in it is shown as it is, and runs nothing."""
    assert EVIL in await text(site)
    assert await site.tab.run("document.images.length") == 0
    assert "waiting" in await site.tab.run("document.title")


async def test_the_browser_finds_nothing_to_complain_about(site):
    """Neither errors nor violations of the policy, and every request goes to this server."""
    origin = await site.tab.run("location.origin")

    assert site.tab.complaints == []
    assert {url.removeprefix(origin) for url in site.tab.requested} == {"/live", "/live/events"}


async def test_script_that_gets_in_would_not_run(site):
    """The policy holds: neither a script element nor HTML by script is taken."""
    refused = await site.tab.run(
        "(() => { try { document.body.innerHTML = '<b>x</b>'; return false; }"
        " catch (error) { return true; } })()"
    )

    assert refused


async def test_the_keyboard_reaches_the_button_and_pauses(site):
    """Tab goes there first, Enter stops the events."""
    for key, code in (("Tab", 9), ("Enter", 13)):
        for kind in ("keyDown", "keyUp"):
            text = "\r" if key == "Enter" and kind == "keyDown" else ""
            await site.tab.tell(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=code,
                text=text,
            )

    await site.tab.until("document.getElementById('status').textContent === 'paused'")
    assert await site.tab.run("document.activeElement.getAttribute('aria-pressed')") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_has_contrast_in_both_schemes(site, tmp_path, scheme):
    """WCAG 2.2, level AA: 4.5 to 1 for all text, 3 to 1 between a bar and its track."""
    await site.tab.look(tmp_path / "page.png", width=800, height=600, scheme=scheme)
    ratios = await site.tab.run(
        """(() => {
        const style = getComputedStyle(document.documentElement);
        const light = (name) => {
          const value = style.getPropertyValue(name).trim().slice(1);
          const parts = [0, 2, 4].map((i) => parseInt(value.slice(i, i + 2), 16) / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
          return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const ratio = (a, b) => {
          const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
          return (bright + 0.05) / (dark + 0.05);
        };
        const texts = ["--text", "--muted", "--bad"];
        return {
          text: Math.min(...texts.flatMap((a) => ["--card", "--page"].map((b) => ratio(a, b)))),
          bar: ratio("--bar", "--track"),
        };
        })()"""
    )

    assert ratios["text"] >= 4.5
    assert ratios["bar"] >= 3


async def test_a_phone_needs_no_sideways_scrolling(site, tmp_path):
    """At 360 pixels the page is as wide as the screen; wide tables scroll in themselves."""
    await site.tab.look(tmp_path / "page.png", width=360, height=700)

    assert await site.tab.run("document.documentElement.scrollWidth") == 360


async def test_bars_do_not_slide_for_those_who_ask(site):
    """prefers-reduced-motion: a bar has its new length at once."""
    slides = "getComputedStyle(document.querySelector('.fill')).transitionDuration"
    assert await site.tab.run(slides) == "0.6s"
    await site.tab.tell(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-reduced-motion", "value": "reduce"}],
    )

    assert await site.tab.run(slides) == "0s"
