"""Requests to an API server that does not answer as it should.

The server is a small one of the test's: a real one cannot be made to answer so.
"""

from __future__ import annotations

from types import SimpleNamespace

import kopf
import pytest
from aiohttp import web

from forebay_operator.cluster.api import ApiError, Cluster
from forebay_operator.resources import BY_NAME, POLICY

PATH = "/apis/forebay.dev/v1alpha1/flowcontrolpolicies"
SLICE = BY_NAME["discovery.k8s.io/v1", "EndpointSlice"]


@pytest.fixture
async def server():
    """Serves what the test puts into `answers`, in turn; keeps what was asked in `asked`."""

    async def answer(request):
        server.asked.append((request.path, dict(request.query), request.headers))
        return server.answers.pop(0)

    server = SimpleNamespace(asked=[], answers=[])
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


@pytest.fixture
async def cluster(server):
    tokens = iter(f"token-{number}" for number in range(100))
    cluster = Cluster(lambda: kopf.ConnectionInfo(server=server.url, token=next(tokens)))
    yield cluster
    await cluster.close()


async def listed(cluster, kind, namespace=""):
    """All objects of a LIST."""
    return [item async for part in cluster.pages(kind, namespace) for item in part.items]


def page(items, token=""):
    body = {"kind": "FlowControlPolicyList", "metadata": {"continue": token}, "items": items}
    return web.json_response(body)


async def test_a_list_is_read_to_its_last_page(server, cluster):
    """Each page's token asks for the next."""
    server.answers += [page([{"a": 1}], "next"), page([{"a": 2}])]
    assert await listed(cluster, POLICY) == [{"a": 1}, {"a": 2}]
    assert [query.get("continue") for _, query, _ in server.asked] == [None, "next"]
    assert {path for path, _, _ in server.asked} == {PATH}


async def test_only_what_is_labelled_is_listed(server, cluster):
    """A cluster has far more EndpointSlices than ours."""
    server.answers += [page([])]
    await listed(cluster, SLICE, "default")
    assert server.asked[0][1]["labelSelector"] == "forebay.dev/inference-pool"


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.json_response({}),
        lambda: web.json_response({"kind": "Status", "items": []}),
        lambda: web.json_response([]),
        lambda: web.Response(text="<html>", content_type="text/html"),
        lambda: web.Response(text='{"kind": "Fl', content_type="application/json"),
    ],
)
async def test_what_is_no_list_is_an_error(server, cluster, answer):
    """What a list does not hold is removed: a proxy's page must not look like an empty one."""
    server.answers.append(answer())
    with pytest.raises(ApiError):
        await listed(cluster, POLICY)


async def test_a_refused_token_is_read_anew_once(server, cluster):
    """A service account's token is renewed in its file."""
    server.answers += [web.Response(status=401), page([])]
    assert await listed(cluster, POLICY) == []
    sent = [headers["authorization"] for _, _, headers in server.asked]
    assert sent == ["Bearer token-0", "Bearer token-1"]
    server.answers += [web.Response(status=401), web.Response(status=401)]
    with pytest.raises(ApiError, match="credentials"):
        await listed(cluster, POLICY)


@pytest.mark.parametrize(
    ("header", "seconds"), [("7", 7), ("1e9", 60), ("soon", 0), ("-1", 0), ("nan", 0)]
)
async def test_retry_after_is_read_within_reason(server, cluster, header, seconds):
    """No server may stop us for a day."""
    server.answers.append(web.Response(status=429, headers={"retry-after": header}))
    with pytest.raises(ApiError) as error:
        await listed(cluster, POLICY)
    assert (error.value.status, error.value.retry_after_seconds) == (429, seconds)


async def test_credentials_that_cannot_be_read_are_an_error_of_that_request():
    """A file that is being renewed is read half; the process goes on."""

    def broken():
        raise FileNotFoundError("kubeconfig")

    with pytest.raises(ApiError, match="kubeconfig"):
        await listed(Cluster(broken), POLICY)


async def test_a_server_that_is_away_is_an_error():
    """Status 0: it was not asked."""
    cluster = Cluster(lambda: kopf.ConnectionInfo(server="http://127.0.0.1:9"))
    with pytest.raises(ApiError) as error:
        await listed(cluster, POLICY)
    assert error.value.status == 0
    await cluster.close()
