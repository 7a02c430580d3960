"""Command lines that are wrong: exit status 2 and a message that names the flag."""

from __future__ import annotations

import pytest

from forebay_epp import settings as epp
from forebay_operator import settings as operator

LOOPBACK = ("--control-bind-address=127.0.0.1",)
ISSUING = ("--control-tls-secret=s", "--control-ca-configmap=c", "--control-server-name=n")
DIAL = ("--control-address=127.0.0.1:8443", "--control-insecure")


def refusal(parse, capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(list(flags))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "--control-tls-path"),
        (("--control-client-auth=none",), "--control-tls-path"),
        (("--control-tls-path=/tls", "--control-client-auth=none"), "--control-client-auth"),
        ((*LOOPBACK, "--control-client-auth=certificate"), "--control-client-auth"),
        ((*LOOPBACK, "--control-client-auth=password"), "--control-client-auth"),
        ((*LOOPBACK, "--control-audience="), "--control-audience"),
        ((*LOOPBACK, "--lease-namespace="), "--lease-namespace"),
        ((*LOOPBACK, "--lease-name="), "--lease-name"),
        ((*LOOPBACK, "--namespace=Not_A_Name"), "--namespace"),
        ((*LOOPBACK, "--namespace="), "--namespace"),
        ((*LOOPBACK, "--control-port=65536"), "--control-port"),
        ((*LOOPBACK, "--http-port=-1"), "--http-port"),
        (("--control-bind-address=localhost",), "--control-bind-address"),
        ((*LOOPBACK, "--http-bind-address=x"), "--http-bind-address"),
        ((*LOOPBACK, "--manifests=."), "--control-client-auth"),
        ((*LOOPBACK, "--manifests=/nowhere", "--control-client-auth=none"), "--manifests"),
        ((*LOOPBACK, "--control-tls=/x"), "--control-tls"),
        (("--control-tls-secret=s", "--control-server-name=n"), "--control-ca-configmap"),
        (("--control-tls-secret=s", "--control-ca-configmap=c"), "--control-server-name"),
        ((*LOOPBACK, "--control-server-name=n"), "--control-tls-secret"),
        ((*ISSUING, "--control-tls-path=/tls"), "--control-tls-path"),
        ((*ISSUING, "--control-client-auth=certificate"), "--control-client-auth"),
        ((*ISSUING, "--control-ca-configmap=No_Name/c"), "--control-ca-configmap"),
        ((*ISSUING, "--control-ca-configmap="), "--control-ca-configmap"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_operator_s_command_line(flags, named, capsys):
    """Each message says which flag is wrong."""
    assert named in refusal(operator.parse, capsys, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--control-client-auth=certificate", "--control-bind-address=0.0.0.0"),
        (*LOOPBACK, "--control-client-auth=none"),
    ],
)
def test_a_folder_is_never_served_as_if_it_had_tls(flags, tmp_path, capsys):
    """Its control channel is plaintext and trusts every peer: on loopback only, and explicitly."""
    flags = (f"--manifests={tmp_path}", f"--control-tls-path={tmp_path}", *flags)

    assert "--manifests" in refusal(operator.parse, capsys, *flags)


def test_the_operator_s_defaults_are_those_of_a_pod():
    """TLS, tokens, all namespaces."""
    given = operator.parse(["--control-tls-path=/tls"])

    assert (given.control_client_auth, given.namespaces) == ("token", ())
    assert (given.control_bind_address, given.control_port) == ("0.0.0.0", 8443)


def test_the_ca_is_published_where_the_secret_is_unless_a_namespace_is_named():
    """The Lease's namespace is where the operator runs."""
    given = operator.parse(
        [*ISSUING, "--lease-namespace=system", "--control-ca-configmap=serving/ca"]
    )

    assert given.control_ca_configmaps == (("system", "c"), ("serving", "ca"))


def test_namespaces_given_twice_are_watched_once():
    """In the order in which they came."""
    given = operator.parse(["--control-tls-path=/tls", "-n", "b", "-n", "a", "-n", "b"])

    assert given.namespaces == ("b", "a")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "--control-address"),
        ((*DIAL, "--plan-file=/p"), "--plan-file"),
        (("--control-address=operator",), "--control-address"),
        (("--control-address=:8443",), "--control-address"),
        (("--control-address=operator:0",), "--control-address"),
        (("--control-address=operator:8443",), "--control-ca-path"),
        (("--control-address=operator:8443", "--control-insecure"), "--control-insecure"),
        ((*DIAL, "--control-ca-path=/ca"), "--control-ca-path"),
        ((*DIAL, "--control-token-path=/t"), "--control-insecure"),
        ((*DIAL, "--control-cert-path=/c"), "--control-insecure"),
        ((*DIAL, "--stats-interval=0s"), "--stats-interval"),
        ((*DIAL, "--stats-interval=100ms"), "--stats-interval"),
        ((*DIAL, "--bootstrap-timeout=soon"), "--bootstrap-timeout"),
        ((*DIAL, "--max-streams=0"), "--max-streams"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_picker_s_command_line(flags, named, capsys):
    """Each message says which flag is wrong."""
    assert named in refusal(epp.parse, capsys, *flags)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "127.9.9.9"])
def test_plaintext_is_for_loopback(host):
    """Whichever way it is written."""
    given = epp.parse([f"--control-address={host}:8443", "--control-insecure"])

    assert given.control.ca_path is None


def test_the_picker_s_pod_is_in_its_pool_s_namespace_unless_said_otherwise(monkeypatch):
    """Outside a cluster there is no pod."""
    monkeypatch.delenv("POD_NAMESPACE", raising=False)

    assert epp.parse([*DIAL, "--pool-namespace=serving"]).control.pod_namespace == "serving"
    given = epp.parse([*DIAL, "--pool-namespace=serving", "--pod-namespace=other"])
    assert given.control.pod_namespace == "other"
