"""The simulated server over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import aiohttp
import pytest

from forebay_sim.hardware import PRESETS, Hardware
from forebay_sim.server import ServerSettings, serve

FAST = Hardware(max_num_seqs=2, overhead_seconds=0.001, weights_seconds=0.0)


@pytest.fixture
async def start():
    """Start servers that stop with the test; returns their URL."""
    runners = []

    async def begin(**settings) -> str:
        runner, port = await serve(
            ServerSettings(**({"hardware": FAST} | settings)), "127.0.0.1", 0
        )
        runners.append(runner)
        return f"http://127.0.0.1:{port}"

    yield begin
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def http():
    async with aiohttp.ClientSession() as session:
        yield session


async def until(claim) -> None:
    async with asyncio.timeout(5):
        while not await claim():  # noqa: ASYNC110  # the state of a server
            await asyncio.sleep(0.005)


def chat(**fields):
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}]} | fields


async def test_a_chat_completion_has_as_many_tokens_as_asked_for(start, http):
    """JSON with text and usage; who served is in a header."""
    url = await start()

    async with http.post(f"{url}/v1/chat/completions", json=chat(max_tokens=3)) as answer:
        body = await answer.json()

    assert answer.headers["x-inference-port"] == url.rpartition(":")[2]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert len(body["choices"][0]["message"]["content"].split()) == 3


@pytest.mark.parametrize("tokens", [1, 2, 20])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_a_stream_has_one_event_per_token_then_usage_then_the_end(start, http, tokens, path):
    """Server-sent events as vLLM writes them."""
    url = await start()
    body = {"model": "m", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    options = {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}

    async with http.post(f"{url}/v1/{path}", json=body | options) as answer:
        text = (await answer.read()).decode()

    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    *chunks, usage = map(json.loads, events)
    words = [
        choice.get("text") or choice.get("delta", {}).get("content")
        for chunk in chunks
        for choice in chunk["choices"]
    ]
    assert len([word for word in words if word]) == tokens
    assert usage["usage"]["completion_tokens"] == tokens


async def test_a_client_that_leaves_frees_its_slot(start, http):
    """The next request runs, long before the first would have ended."""
    url = await start(hardware=replace(PRESETS["plain"], max_num_seqs=1))
    request = asyncio.create_task(
        http.post(f"{url}/v1/chat/completions", json=chat(max_tokens=100_000))
    )

    async def running() -> bool:
        return await gauge(http, url, "num_requests_running") == 1

    await until(running)
    request.cancel()
    async with http.post(f"{url}/v1/chat/completions", json=chat(max_tokens=1)) as answer:
        assert answer.status == 200


async def test_the_page_stands_still_when_the_only_client_leaves(start, http):
    """An engine without a step to end publishes nothing, as vLLM."""
    url = await start()
    request = asyncio.create_task(
        http.post(f"{url}/v1/chat/completions", json=chat(max_tokens=100_000))
    )

    async def running() -> bool:
        return await gauge(http, url, "num_requests_running") == 1

    async def standing_still() -> bool:
        before = await gauge(http, url, "generation_tokens_total")
        await asyncio.sleep(0.05)
        return await gauge(http, url, "generation_tokens_total") == before

    await until(running)
    request.cancel()
    await until(standing_still)

    assert await running()


async def test_a_request_with_a_schema_is_deferred(start, http):
    """While its grammar is compiled it waits, for no capacity."""
    url = await start(grammar_seconds_per_kilobyte=60.0)
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    request = asyncio.create_task(
        http.post(f"{url}/v1/chat/completions", json=chat(response_format=schema))
    )

    async def deferred() -> bool:
        page = await metrics(http, url)
        return 'reason="capacity"} 0.0' in page and 'reason="deferred"} 1.0' in page

    await until(deferred)
    request.cancel()


async def test_no_more_wait_inside_than_may(start, http):
    """The next gets 429."""
    hardware = replace(PRESETS["plain"], max_num_seqs=1)
    url = await start(hardware=hardware, max_waiting=1)
    requests = [
        asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=chat(max_tokens=100_000)))
        for _ in range(2)
    ]

    async def full() -> bool:
        return await gauge(http, url, "num_requests_waiting") == 1

    await until(full)
    async with http.post(f"{url}/v1/chat/completions", json=chat()) as answer:
        status = answer.status
    for request in requests:
        request.cancel()

    assert status == 429


async def test_a_restart_loses_requests_and_counters_and_takes_its_time(start, http):
    """Connections are cut, 503 while it starts, counters begin at 0."""
    url = await start(hardware=replace(FAST, startup_seconds=0.3))

    async def started() -> bool:
        async with http.get(f"{url}/health") as answer:
            return answer.status == 200

    async def running() -> bool:
        return await gauge(http, url, "num_requests_running") == 1

    await until(started)
    request = asyncio.create_task(
        http.post(f"{url}/v1/chat/completions", json=chat(max_tokens=100_000))
    )
    await until(running)

    async with http.post(f"{url}/admin/restart") as answer:
        lost = (await answer.json())["lost"]
    with pytest.raises(aiohttp.ClientError):
        await request
    async with http.post(f"{url}/v1/chat/completions", json=chat()) as answer:
        status = answer.status
    await until(started)

    assert (lost, status) == (1, 503)
    assert await gauge(http, url, "num_requests_running") == 0
    assert await gauge(http, url, "generation_tokens_total") == 0


async def gauge(http, url, name: str) -> float:
    """The value of vLLM's series of one engine."""
    page = await metrics(http, url)
    start = f'vllm:{name}{{engine="0",model_name="*"}} '
    return next(
        float(line.removeprefix(start)) for line in page.splitlines() if line.startswith(start)
    )


async def metrics(http, url) -> str:
    async with http.get(f"{url}/metrics") as answer:
        return await answer.text()


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b'{"model":"m","messages":[]}', 400, "messages"),
        (b'{"model":"other","messages":[{"content":"x"}]}', 404, "model"),
        (b'{"model":"m","messages":[{"content":"x"}],"max_tokens":0}', 400, "max_tokens"),
    ],
)
async def test_bad_requests_get_openais_error(start, http, body, status, param):
    """With the field at fault."""
    url = await start(models=("m",))

    async with http.post(f"{url}/v1/chat/completions", data=body) as answer:
        error = (await answer.json())["error"]

    assert (answer.status, error["code"], error["param"]) == (status, status, param)


async def test_adapters_are_models_and_have_metrics(start, http):
    """LoRA names are served and listed; their series exists only then."""
    url = await start(models=("base",), loras=("tuned",))

    async with http.post(f"{url}/v1/chat/completions", json=chat(model="tuned")) as answer:
        status = answer.status
    async with http.get(f"{url}/v1/models") as answer:
        names = [model["id"] for model in (await answer.json())["data"]]

    assert (status, names) == (200, ["base", "tuned"])
    assert 'lora_requests_info{max_lora="1"' in await metrics(http, url)


async def test_metrics_can_lie_and_fail_on_demand(start, http):
    """For tests of scrapers."""
    url = await start(metrics="vllm-2025")
    lie = {"metrics": {"mode": "fake", "running": 7, "waiting": 3, "kv": 0.5}}

    async with http.post(f"{url}/admin/config", json=lie) as answer:
        assert answer.status == 200
    page = await metrics(http, url)
    async with http.post(f"{url}/admin/config", json={"metrics": {"mode": "error"}}) as answer:
        assert answer.status == 200
    async with http.get(f"{url}/metrics") as answer:
        status = answer.status
    async with http.post(f"{url}/admin/config", json={"metrics": {"mode": "nonsense"}}) as answer:
        refused = answer.status

    assert 'vllm:gpu_cache_usage_perc{engine="0",model_name="*"} 0.5' in page
    assert (status, refused) == (500, 400)


async def test_it_remembers_how_often_it_saw_each_request(start, http):
    """The ledger that tests of exactly-once compare with."""
    url = await start()
    for _ in range(2):
        headers = {"x-request-id": "a"}
        async with http.post(f"{url}/v1/completions", data=b"{", headers=headers) as answer:
            await answer.read()

    async with http.get(f"{url}/admin/requests") as answer:
        assert await answer.json() == {"count": 2, "ids": {"a": 2}}
