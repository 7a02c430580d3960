"""Archives of images, in the form that `docker save` writes: layers, configurations, a manifest."""

from __future__ import annotations

import json
import os
import tarfile
from hashlib import sha256
from io import BytesIO
from typing import IO, TYPE_CHECKING

from cluster.needs import UserError

if TYPE_CHECKING:
    from pathlib import Path

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}  # as images call them


def write_program(program: Path, image: str, output: Path) -> None:
    """Write an archive with an image of one static program, which does not run as root."""
    layer = BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        _add(tar, program.name, program.read_bytes(), 0o755)
    content = layer.getvalue()
    digest = f"sha256:{sha256(content).hexdigest()}"
    config = {
        "architecture": MACHINES[os.uname().machine],
        "os": "linux",
        "config": {"Entrypoint": [f"/{program.name}"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [image], "Layers": ["layer.tar"]}]
    with tarfile.open(output, "w") as tar:
        _add(tar, "config.json", json.dumps(config).encode())
        _add(tar, "layer.tar", content)
        _add(tar, "manifest.json", json.dumps(manifest).encode())


def merge(archives: list[Path], output: IO[bytes]) -> None:
    """Write one archive with the images of several; layers that they share come once.

    Raises:
        UserError: one of them is no such archive.
    """
    manifest = []
    written = set()
    with tarfile.open(fileobj=output, mode="w|") as merged:
        for archive in archives:
            try:
                with tarfile.open(archive) as tar:
                    images = json.loads(tar.extractfile("manifest.json").read())
                    for image in images:
                        for name in {image["Config"], *image["Layers"]} - written:
                            info = tar.getmember(name)
                            data = tar.extractfile(info)
                            plain = tarfile.TarInfo(name)
                            # A layer may be a link to the same one of another image.
                            plain.size = data.seek(0, os.SEEK_END)
                            data.seek(0)
                            merged.addfile(plain, data)
                            written.add(name)
                    manifest += images
            except (OSError, KeyError, tarfile.TarError, ValueError) as error:
                raise UserError(f"{archive} is no archive of images: {error}") from error
        _add(merged, "manifest.json", json.dumps(manifest).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    tar.addfile(info, BytesIO(content))
