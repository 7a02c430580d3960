"""The Helm chart, rendered and installed by the real helm."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import yaml
from api_server import need

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "forebay"
PROGRAM = ROOT / "hack" / "helm"
RELEASE, NAMESPACE = "forebay", "forebay-system"
KUBERNETES = "1.34.0"
# The first call on a machine builds helm.
BUILD_SECONDS = 1800


@cache
def _home() -> dict[str, str]:
    need("go")
    folder = tempfile.mkdtemp(prefix="helm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {f"HELM_{part}_HOME": f"{folder}/{part.lower()}" for part in ("CACHE", "CONFIG", "DATA")}


def helm(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run helm; with check, an exit status other than 0 fails the test with what it said."""
    done = subprocess.run(
        [str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=BUILD_SECONDS,
        env={**os.environ, **_home()},
    )
    assert not check or done.returncode == 0, done.stderr + done.stdout
    return done


@cache
def render(
    *options: str, release: str = RELEASE, namespace: str = NAMESPACE, check: bool = True
) -> subprocess.CompletedProcess:
    """Render the chart as for a cluster that is of today; once for the same options."""
    return helm(
        *("template", release, str(CHART), f"--namespace={namespace}"),
        *(f"--kube-version={KUBERNETES}", *options),
        check=check,
    )


def objects(*options: str, **names: str) -> list[dict]:
    """Render the chart and read what it is."""
    rendered = render(*options, **names).stdout
    return [each for each in yaml.load_all(rendered, yaml.CSafeLoader) if each]


def one(found: list[dict], kind: str, name: str) -> dict:
    """Return the object of this kind and name."""
    (only,) = (each for each in found if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return only


def container(deployment: dict) -> dict:
    """Return the only container of a Deployment's pods."""
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only
