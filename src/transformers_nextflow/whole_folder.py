"""Saving that is never half done: a folder that was being written when its process ended does not load."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"

# Nothing loads without its marker.
MARKERS = ("adapter_config.json", "config.json", "processor_config.json", "model_index.json")


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[str]:
    """Yields a folder to write to; when all files are written, they replace those of `folder`.

    A reader finds the old files or the new ones, never a mixture: for the moment of renaming, and after a kill in that
    moment, the files are there but do not load. Files of other names stay, except for weights (of one variant) beside
    new ones.
    """
    target = Path(folder)
    partial = target / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir(parents=True)
    mode = partial.stat().st_mode & 0o666  # the umask's, where safetensors gives its files 0600
    try:
        yield str(partial)
        names = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        weights = {(name.parent, which) for name in names if (which := _weights(name.name))}
        markers = sorted((name for name in names if name.name in MARKERS), key=lambda name: len(name.parts))
        for name in markers:  # the outermost goes first and comes last
            (target / name).unlink(missing_ok=True)
        for place in {place for place, _ in weights}:
            for old in (target / place).glob("*.safetensors*"):
                if (place, _weights(old.name)) in weights and place / old.name not in names:
                    old.unlink()
        for name in sorted(names, key=lambda name: -markers.index(name) if name in markers else -len(names)):
            (partial / name).chmod(mode)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, target / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _weights(name: str) -> tuple[str, ...] | None:
    """Stem and variant of the weights that a file is a part of: a whole, a shard, or an index of shards."""
    shard = r"([a-z_]+)((?:\.\w+)?)(?:-\d+-of-\d+)?\.safetensors"
    match = re.fullmatch(shard, name) or re.fullmatch(r"([a-z_]+)\.safetensors\.index((?:\.\w+)?)\.json", name)
    return match and match.groups()
