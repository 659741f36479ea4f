"""Downloads files of a repository of the Hub into a folder, once; a run that was killed goes on.

    python examples/download.py --repository Qwen/Qwen2.5-0.5B --files "*.json" "*.safetensors" merges.txt \\
        --output runs/mine/qwen
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

DONE = "downloaded.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repository", required=True, help="OWNER/NAME")
    parser.add_argument("--type", choices=["model", "dataset"], default="model")
    parser.add_argument("--files", nargs="+", required=True, help="names, or patterns")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    where = {"repo_id": options.repository, "repo_type": options.type}
    revision = HfApi().repo_info(**where, revision=options.revision).sha
    folder = options.output
    snapshot_download(**where, revision=revision, allow_patterns=options.files, local_dir=folder)
    if missing := [pattern for pattern in options.files if not any(folder.glob(pattern))]:
        raise ValueError(f"{options.repository} has no files {', '.join(missing)}.")
    (folder / DONE).write_text(json.dumps({**where, "revision": revision}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
