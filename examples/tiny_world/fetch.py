"""Fetches the two npm packages behind the emoji family, pinned by version and SHA-256, into a cache folder.

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


def default_cache() -> Path:
    """`$TRANSFORMERS_NEXTFLOW_CACHE`, or `~/.cache/transformers-nextflow`."""
    return Path(os.environ.get("TRANSFORMERS_NEXTFLOW_CACHE") or Path.home() / ".cache" / "transformers-nextflow")


def fetch(package: NpmPackage, cache: str | Path | None = None) -> Path:
    """Returns the path of a package's archive, downloading it with npm's own client when the cache has none.

    Raises:
        `RuntimeError`: if npm is missing or fails, or if the archive is not the one that was pinned.
    """
    folder = Path(cache) if cache else default_cache()
    path = folder / package.archive
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(
                f"The emoji need {package.name} {package.version} from npm. Install npm, or put {package.archive} "
                f"into {folder}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        spec = f"{package.name}@{package.version}"
        done = subprocess.run([npm, "pack", spec, "--silent"], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"`npm pack {spec}` failed: {done.stderr.strip() or done.stdout.strip()}")
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


if __name__ == "__main__":
    main()
