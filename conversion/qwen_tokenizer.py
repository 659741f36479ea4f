"""Makes NextFlow's text tokenizer from Qwen's rank file.

    python conversion/qwen_tokenizer.py --ranks qwen.tiktoken --num-ranks 8192 --output DIR

Qwen's vocabulary is published as a `.tiktoken` file (one token a line, base64, with its rank); the PyPI package
`dashscope` carries it as `resources/qwen.tiktoken` (Apache-2.0). A rank file holds no merges, but they can be read
off it. With `--num-ranks` only the first ranks are kept, which gives a smaller tokenizer that agrees with Qwen's on
every text that needs no later rank.
"""

import argparse
import base64
import sys
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from transformers import AddedToken, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from transformers_nextflow.processing_nextflow import CHAT_TEMPLATE

sys.path.insert(0, str(Path(__file__).parents[1]))
from conversion.command import one_line_errors
from conversion.streaming import read_json

# Qwen2.5's own added tokens, in order of their ids, which start right after the ranks. True: a control token, left out
# by `decode(skip_special_tokens=True)`; False: an ordinary word that is only never split.
QWEN_ADDED_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|box_start|>": True,
    "<|box_end|>": True,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
}
NEXTFLOW_TOKENS = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
NUM_BYTES = 256


def load_ranks(ranks_path: str | Path, num_ranks: int | None = None) -> dict[bytes, int]:
    """Token bytes -> rank, for the first `num_ranks` ranks of a `.tiktoken` file (all of them by default).

    Raises:
        `ValueError`: if a line cannot be read, if the ranks are not 0, 1, 2, ... or if there are fewer than asked for.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(ranks_path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f'Line {number} of "{ranks_path}" is not "<base64 token> <rank>"; is it a .tiktoken file?'
            ) from error
    if list(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f'The ranks in "{ranks_path}" must count up from 0 without a gap or a repeated token.')
    if num_ranks is None:
        return ranks
    if not NUM_BYTES <= num_ranks <= len(ranks):
        raise ValueError(
            f'`num_ranks` must be between {NUM_BYTES} (the bytes) and {len(ranks)} (what "{ranks_path}" holds), '
            f"but got {num_ranks}."
        )
    return dict(islice(ranks.items(), num_ranks))


def find_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte pair encoding joins last when it makes `token`.

    It runs the encoding with the ranks before the token's own, which must leave exactly two parts.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    unknown = len(ranks)
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, unknown) for left, right in pairwise(parts)]
        best = min(pair_ranks)
        if best >= ranks[token]:
            raise ValueError(f"The ranks are not closed under merges: {token!r} is not made of two tokens before it.")
        index = pair_ranks.index(best)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]


def build_qwen_tokenizer(ranks_path: str | Path, num_ranks: int | None = None) -> Qwen2Tokenizer:
    """
    Builds the fast tokenizer: Qwen's byte-level BPE, then Qwen2.5's added tokens, then `<boi>`, `<eoi>`, `<image>`.

    Args:
        ranks_path (`str` or `Path`):
            A `.tiktoken` file.
        num_ranks (`int`, *optional*):
            Keep this many ranks only; at least 256. By default all of them (151,643 in Qwen's file).

    Returns:
        `Qwen2Tokenizer`: pads on the left with `<|endoftext|>`; `eos_token` is `<|im_end|>`; there is no BOS.

    Raises:
        `ValueError`: if the file is not a rank file or if its ranks are not closed under merges.
    """
    ranks = load_ranks(ranks_path, num_ranks)
    to_unicode = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(to_unicode[byte] for byte in token)

    missing = [byte for byte in range(NUM_BYTES) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f'"{ranks_path}" lacks the single bytes {missing}; byte-level BPE needs all {NUM_BYTES}.')
    merges = [find_merge(token, ranks) for token in ranks if len(token) > 1]
    return make_tokenizer(
        {spell(token): rank for token, rank in ranks.items()}, [(spell(left), spell(right)) for left, right in merges]
    )


def make_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], added: Mapping[int, AddedToken] | None = None
) -> Qwen2Tokenizer:
    """The fast tokenizer of a byte-level vocabulary and its merges, in order.

    Args:
        vocab (`dict[str, int]`): Token -> id.
        merges (list of pairs of `str`): In order.
        added (`Mapping[int, AddedToken]`, *optional*):
            Id -> added token, Qwen2.5's after the vocabulary by default. `<boi>`, `<eoi>` and `<image>` take the ids
            that follow, unless they are among them.

    Raises:
        `ValueError`: if an added token can't have its id, or if those that the chat format needs are not among them.
    """
    if not added:
        tokens = (AddedToken(text, special=special, normalized=False) for text, special in QWEN_ADDED_TOKENS.items())
        added = dict(enumerate(tokens, start=len(vocab)))
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, padding_side="left", unk_token=None, eos_token=None, pad_token=None
    )
    tokenizer.add_tokens([added[token_id] for token_id in sorted(added)])
    ids = tokenizer.get_vocab()
    if moved := [f"{token.content} ({token_id})" for token_id, token in added.items() if ids[str(token)] != token_id]:
        raise ValueError(f"The added tokens {', '.join(moved)} can't keep their ids: there is a gap before them.")
    if missing := [text for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>") if text not in ids]:
        raise ValueError(f"The tokenizer lacks {', '.join(missing)}, which Qwen's chat format is made of.")
    new = [text for text in NEXTFLOW_TOKENS.values() if text not in ids]
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in new], special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer._set_model_specific_special_tokens(NEXTFLOW_TOKENS)  # as arguments they would get ids before Qwen's
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_text_tokenizer(path: str | Path) -> Qwen2Tokenizer:
    """
    NextFlow's text tokenizer from any of the files that Qwen's comes in; added tokens (`<think>`, ...) keep their ids.

    Args:
        path (`str` or `Path`):
            A `.tiktoken` file, a `tokenizer.json`, or a folder with `tokenizer.json` or with `vocab.json` and
            `merges.txt`. Their added tokens stand in `tokenizer.json`, `tokenizer_config.json` or `added_tokens.json`;
            where none of them is, they are Qwen2.5's.

    Raises:
        `ValueError`: if there is no such file, if it is damaged, or if its vocabulary is not byte-level BPE.
    """
    path = Path(path)
    if path.suffix == ".tiktoken" and path.is_file():
        return build_qwen_tokenizer(path)
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    ranks = folder / "vocab.json", folder / "merges.txt"
    if path.is_dir() and not file.is_file() and all(part.is_file() for part in ranks):
        file = ranks[0]
    elif file.name != "tokenizer.json" or not file.is_file():
        raise ValueError(
            f'There is no tokenizer at "{path}". Expected a .tiktoken file, a tokenizer.json, or a folder with '
            "tokenizer.json or with vocab.json and merges.txt."
        )
    content = read_json(file)
    try:
        if file.name == "vocab.json":
            lines = ranks[1].read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
            return make_tokenizer(content, [_pair(merge) for merge in merges], _added_tokens(folder))
        model = content.get("model", {})
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise ValueError(f'it holds a tokenizer of type {model.get("type")!r}; Qwen\'s is "BPE"')
        added = {entry["id"]: _added_token(entry) for entry in content.get("added_tokens") or []}
        return make_tokenizer(model["vocab"], [_pair(merge) for merge in model["merges"]], added)
    except Exception as error:  # the Rust library raises plain ones
        raise ValueError(f'"{file}" can\'t be converted: {error}') from error


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """Id -> added token, of a folder without tokenizer.json."""
    config, plain = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if config.is_file() and (decoder := read_json(config).get("added_tokens_decoder")):
        return {int(token_id): _added_token(entry) for token_id, entry in decoder.items()}
    entries = read_json(plain).items() if plain.is_file() else ()
    return {
        token_id: AddedToken(text, special=QWEN_ADDED_TOKENS.get(text, False), normalized=False)
        for text, token_id in entries
    }


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{name: entry[name] for name in names if name in entry})


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", required=True, help="the .tiktoken file")
    parser.add_argument("--num-ranks", type=int, help="keep only the first so many ranks (default: all)")
    parser.add_argument("--output", required=True, help="folder for the tokenizer's files")
    options = parser.parse_args(arguments)
    with one_line_errors(parser):
        tokenizer = build_qwen_tokenizer(options.ranks, options.num_ranks)
        tokenizer.save_pretrained(options.output)
        print(f"{len(tokenizer)} tokens written to {options.output}")


if __name__ == "__main__":
    main()
