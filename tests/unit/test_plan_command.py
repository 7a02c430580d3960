"""What `forebay plan` shows of a policy: every value that is in force, set or not."""

from __future__ import annotations

from types import SimpleNamespace

from forebay_cli import plan

MANIFESTS = """
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: chat}
spec: {selector: {matchLabels: {app: vllm}}, targetPorts: [{number: 8000}]}
---
apiVersion: forebay.dev/v1alpha1
kind: FlowControlPolicy
metadata: {name: chat}
spec:
  targetRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: chat}]
  bands:
  - name: Critical
    fairness:
    - {between: Models, policy: WeightedFair, weightedFair: {cost: Tokens}}
    - {between: Tenants, policy: TokenFair}
    ordering: {policy: EarliestDeadline}
    queue: {whenFull: DisplaceLower, perFlow: {maxRequests: 500}}
  - {name: Sheddable, maxSaturationPercent: 90, reservedPercent: 5}
  models: [{name: chat, band: Critical, weight: 3, timeToFirstToken: 2s}]
  tenants: {header: x-team, weights: [{name: acme, weight: 2}]}
  trustedHeaders: [Tenant, Deadline]
"""
SHOWN = """\
InferencePool default/chat
├── Critical (priority 100)
│   ├── WeightedFair by tokens between models, TokenFair between tenants, EarliestDeadline within one
│   ├── at most 5000 requests and 512MiB, each for up to 60 s
│   ├── of one tenant at most 500 requests and 512MiB
│   ├── displaces what waits in lower bands when the pool's queue is full
│   └── model chat, weight 3, due after 2 s
├── Standard (priority 0)
│   ├── FCFS between models, FCFS within one
│   └── at most 5000 requests and 512MiB, each for up to 60 s
├── Sheddable (priority -100)
│   ├── FCFS between models, FCFS within one
│   ├── fills the pool up to 90 % of its slots
│   ├── has at least 5 % of the dispatches while it waits
│   └── at most 5000 requests and 512MiB, each for up to 60 s
├── requests for other models join Standard
├── tenants by header x-team, weights acme 2, others 1
├── callers may say when a request is due and how long it may wait
├── in total at most 10000 requests and 1GiB, one at most 8MiB
├── endpoint limit: learned; closed above 95% of its KV cache, prompts wait in it up to 0.5 s
├── a server is chosen by PrefixCache 3, Load 2, picker MaxScore
├── without servers requests wait up to 60 s
├── answers by the proxy's `responses`: Observe, the default, leaves out
│   ├── tokens of each answer: they are shared out by what servers have counted
│   └── times to first token: servers have them for the pool
└── 0 servers in the files
"""  # noqa: E501  # the command's own lines


def test_every_value_that_is_in_force_is_shown(tmp_path, capsys):
    """Of bands that the policy does not list, too; long lines are whole where no terminal is."""
    (tmp_path / "all.yaml").write_text(MANIFESTS)

    assert plan.run(SimpleNamespace(paths=[tmp_path], output="tree")) == 0
    assert capsys.readouterr().out == SHOWN


def test_models_that_observed_answers_name_otherwise_are_named(tmp_path, capsys):
    """Those that a target renames, up to five."""
    models = "".join(
        f"""---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModel
metadata: {{name: m{number}}}
spec: {{modelName: m{number}, poolRef: {{name: chat}}, targetModels: [{{name: t, weight: 1}}]}}
"""
        for number in range(6)
    )
    (tmp_path / "all.yaml").write_text(MANIFESTS + models)

    assert plan.run(SimpleNamespace(paths=[tmp_path], output="tree")) == 0

    line = "the client's name of a model in answers: m0, m1, m2, m3, m4, ..."
    assert line in capsys.readouterr().out
