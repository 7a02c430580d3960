"""What the learned limit makes of pages and of answers that begin."""

from __future__ import annotations

import pytest

from forebay_control.plan import SaturationPlan
from forebay_epp.core.limits import AdaptiveLimit
from forebay_epp.core.limits.adaptive import (
    FIRST_WINDOW,
    LEAST_WINDOW,
    PREFILL_SECONDS,
    SHRUNK_PAGES,
    STEADY_PAGES,
    WINDOW_PART,
)
from forebay_epp.core.terms import EndpointMetrics

SCRAPE_SECONDS = 0.2


class Learner:
    """A limit that is shown a page every 0.2 s."""

    def __init__(self, step_seconds=0.02):
        self.limit = AdaptiveLimit(SaturationPlan())
        self.now = 0.0
        self.steps = self.step_tokens = 0.0
        self.step_seconds = step_seconds
        self.page(0, 0)

    def page(self, running, waiting, *, arrivals=0, ended=0, steps=None, tokens=None, used=None):
        """Show one; by default a step decodes what runs, and all slots are taken."""
        self.now += SCRAPE_SECONDS
        if steps is None:
            steps = SCRAPE_SECONDS / self.step_seconds
        self.steps += steps
        self.step_tokens += steps * (running if tokens is None else tokens)
        page = EndpointMetrics(
            "a", running, waiting, None, self.now, SCRAPE_SECONDS, self.steps, self.step_tokens
        )
        used = self.limit.value if used is None else used
        self.limit.observe(page, used, arrivals, ended, self.now)
        return self.limit.value


def full_at(batch, **options):
    """A limit that has seen a full batch."""
    learner = Learner(**options)
    learner.page(batch, 3 * batch)
    assert learner.limit.full
    assert learner.limit.value == batch
    return learner


def test_a_cold_server_gets_a_few():
    """No page has shown anything yet."""
    assert AdaptiveLimit(SaturationPlan()).value == FIRST_WINDOW


@pytest.mark.parametrize("running", [4, 8, 64, 256])
def test_what_runs_and_a_window_beyond_it_are_let_in(running):
    """A sixteenth of it, one at least."""
    learner = Learner()

    assert learner.page(running, 0) == running + max(LEAST_WINDOW, running // WINDOW_PART)


def test_answers_that_begin_raise_the_limit_before_a_page_does():
    """As acknowledgements open a congestion window."""
    learner = Learner()
    for running in range(1, 17):
        learner.limit.started(running)

    assert learner.limit.value == 16 + LEAST_WINDOW


def test_more_waiting_than_were_sent_prove_a_full_batch():
    """As many may only wait for the next step.

    Those sent before the last page count too, because a page is as old as the last step.
    """
    learner = Learner()
    learner.page(8, 0, arrivals=1)
    assert learner.page(8, 3, arrivals=2) == 8 + LEAST_WINDOW

    assert learner.page(8, 5, arrivals=2) == 8


def test_a_batch_that_keeps_its_size_beside_waiting_requests_is_full():
    """Not after one page less."""
    learner = Learner()
    learner.page(8, 0)
    for _ in range(STEADY_PAGES):
        assert learner.limit.value == 8 + LEAST_WINDOW
        learner.page(8, 1, arrivals=9)

    assert learner.limit.value == 8


def test_a_batch_that_grows_is_not_full():
    """However many wait for the next step."""
    learner = Learner()
    for running in range(8, 80, 8):
        value = learner.page(running, 2, arrivals=9)

        assert value > running


def test_a_page_that_stands_still_teaches_nothing():
    """A step takes long, or the engine idles."""
    learner = Learner()
    value = learner.page(8, 0)

    for _ in range(20):
        assert learner.page(8, 30, steps=0) == value


def test_a_long_prefill_is_no_full_batch():
    """Six long prompts on a server of 64: the batch that was seen stays."""
    learner = Learner()
    learner.page(64, 0)

    for _ in range(30):
        assert learner.page(4, 40, steps=1, tokens=2048, arrivals=1) >= 64


def test_while_prompts_fill_the_steps_what_they_take_in_stands_by():
    """20 a second: as many as it takes in within a quarter of a second."""
    learner = Learner()
    learner.page(10, 0)
    for _ in range(40):
        value = learner.page(10, 4, steps=2, tokens=4000, arrivals=4, ended=4)

    assert value == 10 + round(PREFILL_SECONDS * 20)


def test_a_few_prompts_in_each_step_of_a_large_batch_do_not_fill_it():
    """Such steps are slow beside those of a small batch, and the batch is full all the same."""
    learner = Learner()
    learner.page(2, 0, steps=20, tokens=40)
    learner.page(128, 8, steps=2, tokens=16_000, arrivals=8)
    learner.page(256, 8, steps=2, tokens=16_000, arrivals=8)
    for running in (255, 254, 256, 253, 255, 256, 254, 255):
        value = learner.page(running, 8, steps=7, tokens=5600, arrivals=8, ended=8)

    assert learner.limit.full
    assert value == 256


@pytest.mark.parametrize(("ended", "standby"), [(0, 0), (1, 0), (20, 3)])
def test_what_ends_in_a_step_stands_by_where_it_is_worth_it(ended, standby):
    """10 steps between pages: 0.1 of 64 slots lost in a step are not, 2 are."""
    learner = full_at(64)
    for _ in range(40):
        value = learner.page(64, 1, ended=ended)

    assert value == 64 + standby


def test_a_smaller_batch_is_believed_when_it_lasts():
    """128 where 256 were: within two seconds."""
    learner = full_at(256)
    pages = 0
    while learner.limit.value > 128 and pages < 100:
        learner.page(128, 128)
        pages += 1

    assert SHRUNK_PAGES <= pages <= 2.0 / SCRAPE_SECONDS
    assert learner.limit.value == 128


def test_a_larger_batch_is_found():
    """256 where 128 were: within ten seconds, by trying one more now and then."""
    learner = full_at(128)
    seconds = 0.0
    while learner.limit.value < 256 and seconds < 100:
        learner.page(min(256, learner.limit.value), 0)
        seconds += SCRAPE_SECONDS

    assert seconds < 10


def test_a_try_that_fails_costs_one_request_for_one_page():
    """It waits inside, so the batch is still full."""
    learner = full_at(64)
    for _ in range(100):
        if learner.page(64, 0) > 64:
            break
    assert learner.limit.value == 65

    assert learner.page(64, 1) == 64


def test_requests_that_do_not_begin_close_the_window_until_a_page_explains():
    """A page that shows one waiting beside the same batch proves it full."""
    learner = Learner()
    learner.page(8, 0)
    learner.limit.stuck()
    assert learner.limit.value == 8

    learner.page(8, 1, arrivals=5)
    assert learner.limit.full


def test_a_page_without_anything_waiting_opens_the_window_again():
    """What had not begun was just slow."""
    learner = Learner()
    learner.page(8, 0)
    learner.limit.stuck()

    assert learner.page(8, 0) == 8 + LEAST_WINDOW


def test_a_limit_is_never_below_one():
    """Stuck before anything has run."""
    learner = Learner()
    learner.limit.stuck()

    assert learner.limit.value == 1


def test_an_engine_that_does_not_count_steps_is_learned_from_pages():
    """Growth, and a full batch."""
    limit = AdaptiveLimit(SaturationPlan())
    for number in range(1, 40):
        running = min(32, limit.value)
        waiting = limit.value - running
        page = EndpointMetrics("a", running, waiting, None, number / 5)
        limit.observe(page, limit.value, 1, 1, number / 5)

    assert limit.full
    assert 32 <= limit.value <= 33


def test_a_restarted_engine_is_no_page_that_stands_still():
    """Its counters begin again."""
    learner = full_at(8)
    learner.steps = learner.step_tokens = 0.0

    learner.page(9, 0)
    assert learner.limit.batch == 9
