"""What the converters' commands have in common: options, and uploading the result."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi


def make_parser(description: str | None, source: str) -> argparse.ArgumentParser:
    """The options of every converter; `source` says what it converts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", type=Path, required=True, help=source)
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--dtype", type=_dtype, help="bfloat16, float16 or float32; default: the source's")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file; default: 5GB")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository")
    return parser


def _dtype(name: str) -> torch.dtype:
    if name not in ("bfloat16", "float16", "float32"):
        raise argparse.ArgumentTypeError(f'"{name}" is not bfloat16, float16 or float32')
    return getattr(torch, name)


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the command with the message alone where the user can mend what is wrong."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        parser.exit(1, f"{error}\n")


def report(options: argparse.Namespace) -> None:
    """Says where the result is, and uploads it if that was asked for."""
    print(f"Written: {options.output}")
    if options.push_to_hub:
        print(f"Uploaded: {push_to_hub(options.output, options.push_to_hub)}")


def push_to_hub(folder: Path, repo_id: str) -> str:
    """Uploads a converted checkpoint as it is; the repository is made if it is not there. Returns its full name."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id  # a bare name gets its owner here
    api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload converted checkpoint")
    return repo_id
