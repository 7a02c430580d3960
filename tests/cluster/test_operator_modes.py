"""How an operator starts and stands by: late CRDs, one namespace only, several replicas.

On a cluster of its own, because a missing CRD is missing for every test.
"""

from __future__ import annotations

import secrets

import api_server
import operator_account
import pytest
from control_plane import (
    Authority,
    EPPPod,
    EPPProcess,
    Operator,
    endpoint_slice,
    model,
    policy,
)
from ext_proc_peer import until
from operator_site import (
    SECONDS,
    RestartableOperator,
    Site,
    answer,
    endpoints,
    install,
)

POLICIES = "flowcontrolpolicies.forebay.dev"
POOLS = "inferencepools.inference.networking.k8s.io"
MODELS = "inferencemodels.inference.networking.x-k8s.io"
SWEEP_SECONDS = 60.0
REJECTS = {"unmatched": {"action": "Reject"}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster without our CRDs."""
    folder = tmp_path_factory.mktemp("bare")
    with api_server.running(folder, "--controller-manager") as cluster:
        assert cluster.dir, "CRDs are removed from it"
        yield cluster


@pytest.fixture
def no_crds(cluster):
    """CRDs that earlier tests have installed are gone."""
    found = cluster.get("crds")["items"]
    names = [crd["metadata"]["name"] for crd in found]
    for name in names:
        cluster.kubectl("delete", "crd", name, "--timeout=60s")


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "tls")


@pytest.fixture
def start(cluster, authority, tmp_path):
    """Start an operator with the rights of its mode; all end with the test."""
    started = []

    def start(*namespaces: str, flags: tuple[str, ...] = ()) -> RestartableOperator:
        home = cluster.make_namespace(f"home-{secrets.token_hex(4)}")
        if namespaces:
            kubeconfig = operator_account.namespaced(
                *(cluster, home, tmp_path, *namespaces),
                tokens="--control-client-auth=certificate" not in flags,
                slices="--endpoint-slices" in flags,
            )
        else:
            kubeconfig = operator_account.cluster_wide(cluster, home, tmp_path)
        operator = RestartableOperator(
            *(cluster, tmp_path, authority.leaf("op"), *flags),
            lease_namespace=home,
            kubeconfig=kubeconfig,
            namespaces=namespaces,
        )
        started.append(operator)
        return operator

    yield start
    for operator in started:
        operator.process.end()
        assert "Traceback" not in operator.process.log


@pytest.fixture
def site(cluster, namespace, authority, tmp_path):
    """Make a site in the test's namespace for an operator that is started for it."""
    sites = []

    def site(operator: RestartableOperator, where: str = namespace) -> Site:
        folder = tmp_path / where
        folder.mkdir()
        sites.append(Site(cluster, where, operator.control_port, authority.path, folder))
        return sites[-1]

    yield site
    for found in sites:
        found.end()


@pytest.mark.usefixtures("no_crds")
@pytest.mark.parametrize("mode", ["cluster-wide", "namespaced"])
def test_crds_may_come_later(cluster, namespace, start, site, mode):
    """It is not ready without policies and pools and says why; InferenceModels are picked up."""
    operator = start(*([namespace] if mode == "namespaced" else []))
    process = operator.process
    until(lambda: f"the CRD {POLICIES} to be installed" in process.probe("/readyz"), SECONDS)
    assert process.page("/livez") is not None
    install(cluster, POLICIES)
    until(lambda: process.probe("/readyz").startswith(f"waits for the CRD {POOLS} or"), SECONDS)
    assert process.epoch == 0
    install(cluster, POOLS)
    operator.until_leading()
    here = site(operator)
    here.pool()
    epp = here.epp()
    here.apply(policy("p", "chat", **REJECTS))
    here.until_programmed("p")

    install(cluster, MODELS)
    here.apply(model("m", "chat", "no-such-model"))

    here.until("m", "Programmed", "True", "Programmed", "inferencemodel")
    # The watches go on: an edit of it is in force within moments, not at the next sweep.
    before = epp.version
    here.delete("inferencemodel", "m")
    until(lambda: (epp.version or before) > before, SWEEP_SECONDS / 2)
    assert answer(epp) == 404
    assert process.running


@pytest.fixture
def crds(cluster):
    install(cluster)


@pytest.mark.usefixtures("crds")
def test_one_namespace_only(cluster, namespace, start, site, authority):
    """Nothing of another one is read or written, by a Role and with nothing else.

    Reviewing tokens is allowed for the whole cluster or not at all: EPPs show certificates.
    """
    elsewhere = cluster.make_namespace(f"other-{secrets.token_hex(4)}")
    operator = start(namespace, flags=("--control-client-auth=certificate",))
    operator.until_leading()
    here, there = site(operator), site(operator, elsewhere)
    for one in (there, here):
        one.pool()
        one.apply(policy("p", "chat", **REJECTS))
    leaf = authority.leaf("epp", uri=f"spiffe://cluster.local/ns/{namespace}/sa/default")
    epp = here.epp(f"--control-cert-path={leaf}")
    here.until_programmed("p")
    assert answer(epp) == 404
    shown = operator.process.page("/resources")
    assert namespace in shown
    assert elsewhere not in shown
    assert there.status("p") == {}


@pytest.mark.usefixtures("crds")
@pytest.mark.parametrize("flags", [(), ("--endpoint-slices",)], ids=["default", "opted in"])
def test_endpoint_slices_name_servers_only_where_that_is_wanted(namespace, start, site, flags):
    """They may hold any address; by default they are not even read, nor is that allowed."""
    operator = start(namespace, flags=flags)
    operator.until_leading()
    here = site(operator)
    here.pool()
    here.apply(endpoint_slice("chat", "192.0.2.1"))
    epp = here.epp()
    here.server("vllm-0", "192.0.2.2")
    until(lambda: "192.0.2.2:8000" in endpoints(epp), SECONDS)

    expected = ["192.0.2.1:8000", "192.0.2.2:8000"] if flags else ["192.0.2.2:8000"]
    assert endpoints(epp) == expected


@pytest.mark.usefixtures("crds")
def test_a_standby_is_ready_and_takes_over(cluster, namespace, start, site, authority, tmp_path):
    """It turns EPPs away until the leader goes; then it programs them with a higher epoch."""
    leader = start()
    leader.until_leading()
    here = site(leader)
    here.pool()
    epp = here.epp()
    here.apply(policy("p", "chat", **REJECTS))
    here.until_programmed("p")
    given, options = leader._given, leader._options
    standby = Operator(*given, **{**options, "name": "operator-1", "control_port": None})
    try:
        until(lambda: standby.ready, SECONDS)
        pod = EPPPod(cluster, namespace, "epp-late", "epp")
        late = EPPProcess(tmp_path, pod, "chat", standby.control_port, authority.path)
        here.processes.append(late)
        refusals = ("forebay_control_refusals_total",)
        until(lambda: standby.metric(*refusals, reason="not_leader") > 0, SECONDS)
        assert (standby.epoch, late.program()[0]) == (0, "Defaults")

        before = leader.process.epoch

        assert leader.process.stop() == 0

        until(lambda: standby.epoch > before, SECONDS)
        until(lambda: late.version[0] > before, SECONDS)
        assert answer(late) == answer(epp) == 404
        here.apply(policy("p", "chat"))
        until(lambda: here.status("p").get("endpointPickers", {}).get("desired") == 2, SECONDS)
        assert standby.stop() == 0
    finally:
        standby.end()
