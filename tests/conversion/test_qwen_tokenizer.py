"""The text tokenizer against tiktoken. (tests/fixtures/qwen: the first ranks of Qwen's file, Apache-2.0.)

The whole vocabulary is checked where `QWEN_RANKS` names Qwen's `.tiktoken` file.
"""

import json
import os
import random
import runpy
import sys
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
FIRST_RANKS = ROOT / "tests" / "fixtures" / "qwen" / "first_1024_ranks.tiktoken"

conversion = runpy.run_path(str(ROOT / "conversion" / "qwen_tokenizer.py"))
build_qwen_tokenizer, load_ranks = conversion["build_qwen_tokenizer"], conversion["load_ranks"]
load_text_tokenizer = conversion["load_text_tokenizer"]

# Qwen's own, as its reference tokenizer has it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def reference(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    common, rare = "aeiou thsnrl.,'-\n\t0123ABCé", [chr(code) for code in range(0xA0, 0xD7FF)]
    drawn = [
        "".join(rng.choice(rare) if rng.random() < 0.1 else rng.choice(common) for _ in range(rng.randint(1, 60)))
        for _ in range(count)
    ]
    return [
        "a red circle left of a blue square",
        "Don't  stop!!\r\n\r\n   x = 3.14;\t# ok  ",
        "一个红色的圆在蓝色方块的左边",
        "cafe\u0301 e\u0301",  # NFC joins letter and accent
        "",
        *drawn,
    ]


def mixed_texts(count: int) -> list[str]:
    """Pieces of code, prose and numbers in many scripts, put together at random."""
    rng = random.Random(1)
    ranges = [(0x4E00, 0x9FFF), (0x3040, 0x30FF), (0x600, 0x6FF), (0x400, 0x4FF), (0xAC00, 0xD7A3), (0x900, 0x97F)]
    emoji = [chr(code) for code in range(0x1F300, 0x1F6FF)] + ["👩‍🚀", "🏳️‍🌈", "👍🏽", "🇨🇭"]
    code = (ROOT / "conversion" / "streaming.py").read_text(encoding="utf-8").replace("<", "").splitlines()

    def piece() -> str:
        kind = rng.randrange(5)
        if kind == 0:
            return "\n".join(rng.sample(code, 3))
        if kind == 1:
            low, high = rng.choice(ranges)
            return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))
        if kind == 2:
            return "".join(rng.choices(emoji, k=rng.randint(1, 4)))
        if kind == 3:
            return f"{rng.randint(-(10**9), 10**9):,} {rng.uniform(-1e3, 1e3)} {rng.random():.3e} {rng.getrandbits(9)}"
        return " ".join(rng.choices(["the", "Don't", "naïve", "straße", "I'M", "they'll", "…", "«ça»", "a_b-c"], k=6))

    return [rng.choice(["", " ", "\n\n", "\t"]).join(piece() for _ in range(rng.randint(1, 6))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_qwen_tokenizer(FIRST_RANKS)


def test_same_ids_as_tiktoken(tokenizer):
    encoding = reference(load_ranks(FIRST_RANKS))
    for text in texts(3000):
        normalized = unicodedata.normalize("NFC", text)
        ids = tokenizer(text).input_ids
        assert ids == encoding.encode_ordinary(normalized), repr(text)
        assert tokenizer.decode(ids) == normalized


def test_mixed_texts_as_tiktoken(tokenizer):
    encoding = reference(load_ranks(FIRST_RANKS))
    for text in mixed_texts(300):
        assert tokenizer(text).input_ids == encoding.encode_ordinary(unicodedata.normalize("NFC", text)), repr(text)


@pytest.mark.parametrize(
    "files", ["tiktoken", "folder with tokenizer.json", "tokenizer.json", "vocab.json, merges.txt"]
)
def test_every_form_of_the_files_gives_the_same_tokenizer(tokenizer, files, tmp_path):
    path = tmp_path
    if files == "tiktoken":
        path = FIRST_RANKS
    elif files == "vocab.json, merges.txt":  # as Qwen's folders have them, without the added tokens
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        merges = "\n".join(" ".join(merge) for merge in model["merges"])
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    else:
        tokenizer.save_pretrained(tmp_path)
        path = tmp_path / "tokenizer.json" if files == "tokenizer.json" else tmp_path
    loaded = load_text_tokenizer(path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    for text in texts(200):
        assert loaded(text + "<boi>").input_ids == tokenizer(text + "<boi>").input_ids


QWEN3_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")


def published(family: str, form: str, folder: Path) -> dict[str, int]:
    """Files as Qwen publishes them, of 151,643 ranks (those after the first 1,024 are of no use), and the added ids."""
    small = build_qwen_tokenizer(FIRST_RANKS)
    model = json.loads(small.backend_tokenizer.to_str())["model"]
    vocab = model["vocab"] | {f"unused {rank}": rank for rank in range(1024, 151643)}
    texts = {**conversion["QWEN_ADDED_TOKENS"], **(dict.fromkeys(QWEN3_TOKENS, False) if family == "Qwen3" else {})}
    fields = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = {
        151643 + i: {"content": text, "special": special, **fields} for i, (text, special) in enumerate(texts.items())
    }
    if form == "tokenizer.json":
        entries = [{"id": token_id, **entry} for token_id, entry in added.items()]
        (folder / form).write_text(json.dumps({"model": {**model, "vocab": vocab}, "added_tokens": entries}))
    else:
        (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]), encoding="utf-8")
        ids = {entry["content"]: token_id for token_id, entry in added.items()}
        content = {"added_tokens_decoder": added} if form == "tokenizer_config.json" else ids
        (folder / form).write_text(json.dumps(content))
    return {entry["content"]: token_id for token_id, entry in added.items()}


@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("family", ["Qwen2.5", "Qwen3"])
def test_added_tokens_of_the_source_keep_their_ids(family, form, tmp_path):
    ids = published(family, form, tmp_path)
    tokenizer = load_text_tokenizer(tmp_path)
    for text, token_id in ids.items():
        assert tokenizer(f"a{text}b").input_ids == [64, token_id, 65], text
    first = max(ids.values()) + 1
    assert first == (151669 if family == "Qwen3" else 151665)
    ours = [tokenizer.boi_token_id, tokenizer.eoi_token_id, tokenizer.image_token_id]
    assert ours == [first, first + 1, first + 2] == tokenizer.convert_tokens_to_ids(["<boi>", "<eoi>", "<image>"])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151645, 151643)
    words = "<tool_call>" + "<think></think>" * (family == "Qwen3")
    assert tokenizer.decode(tokenizer(f"<boi>{words}<|im_end|>").input_ids, skip_special_tokens=True) == words
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


def test_added_tokens_that_cannot_keep_their_ids(tmp_path):
    model = json.loads(build_qwen_tokenizer(FIRST_RANKS).backend_tokenizer.to_str())["model"]
    for entries, message in [
        (
            [{"id": 1024, "content": "<|endoftext|>"}, {"id": 1026, "content": "<think>"}],
            r"<think> \(1026\) can't keep",
        ),
        ([{"id": 1024, "content": "<think>"}], r"lacks <\|endoftext\|>, <\|im_start\|>, <\|im_end\|>"),
        ([{"content": "<think>"}], "can't be converted: 'id'"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": entries}))
        with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
            load_text_tokenizer(tmp_path)


def test_files_of_no_tokenizer_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "ranks.bin"):
        with pytest.raises(ValueError, match=r"There is no tokenizer at .* Expected a \.tiktoken file"):
            load_text_tokenizer(path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    with pytest.raises(ValueError, match=r"tokenizer of type 'Unigram'; Qwen's is \"BPE\""):
        load_text_tokenizer(tmp_path)


def test_fewer_ranks_agree_where_they_suffice(tokenizer):
    smaller = build_qwen_tokenizer(FIRST_RANKS, num_ranks=512)
    assert smaller.vocab_size == 512
    compared = 0
    for text in texts(500):
        ids = tokenizer(text).input_ids
        if max(ids, default=0) < 512:
            assert smaller(text).input_ids == ids
            compared += 1
    assert compared > 20


@pytest.mark.skipif("QWEN_RANKS" not in os.environ, reason="QWEN_RANKS does not name Qwen's rank file")
def test_whole_vocabulary():
    tokenizer = build_qwen_tokenizer(os.environ["QWEN_RANKS"])
    encoding = reference(load_ranks(os.environ["QWEN_RANKS"]))
    sources = [path.read_text().replace("<", "") for path in (ROOT / "src").rglob("*.py")]  # no special tokens
    for text in [*texts(3000), *mixed_texts(2000), *sources]:
        assert tokenizer(text).input_ids == encoding.encode_ordinary(unicodedata.normalize("NFC", text))
    # Qwen2.5's ids, and the defaults of NextFlowConfig.
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [151643, 151644, 151645]
    assert tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|file_sep|>"]) == [151652, 151664]
    assert [tokenizer.boi_token_id, tokenizer.eoi_token_id, tokenizer.image_token_id] == [151665, 151666, 151667]


def test_special_tokens_follow_the_ranks(tokenizer):
    assert len(tokenizer) == 1024 + 22 + 3
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [1024, 1025, 1026]
    assert [tokenizer.boi_token_id, tokenizer.eoi_token_id, tokenizer.image_token_id] == [1046, 1047, 1048]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.bos_token is None and tokenizer.unk_token is None
    assert tokenizer.padding_side == "left"
    ids = tokenizer("a<image> b<boi><tool_call>").input_ids
    assert [tokenizer.image_token_id, tokenizer.boi_token_id] == [ids[1], ids[-2]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b<tool_call>"


def test_round_trip_through_the_script(tokenizer, tmp_path, monkeypatch, capsys):
    arguments = ["--ranks", str(FIRST_RANKS), "--num-ranks", "600", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["qwen_tokenizer.py", *arguments])
    runpy.run_path(str(ROOT / "conversion" / "qwen_tokenizer.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("625 tokens")
    built, loaded = build_qwen_tokenizer(FIRST_RANKS, 600), AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(built)
    assert loaded.get_vocab() == built.get_vocab()
    assert loaded.special_tokens_map == built.special_tokens_map
    assert (loaded.padding_side, loaded.image_token_id, loaded.chat_template) == ("left", 624, built.chat_template)
    for text in texts(200):
        assert loaded(text + "<boi>").input_ids == built(text + "<boi>").input_ids


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it? "}, {"type": "image", "image": None}]},
        {"role": "assistant", "content": "A cat."},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is it? <image><|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<image><|im_end|>\n<|im_start|>assistant\n")
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "A cat.<|im_end|>"
    with pytest.raises(Exception, match='parts "text", "image" and "video", not "audio"'):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}], tokenize=False)


def test_bad_rank_files(tmp_path):
    def written(content: str) -> Path:
        path = tmp_path / "ranks.tiktoken"
        path.write_text(content)
        return path

    lines = FIRST_RANKS.read_text().splitlines()
    with pytest.raises(ValueError, match=r"Line 1 of .* is it a \.tiktoken file"):
        build_qwen_tokenizer(written('{"a": 1}'))
    with pytest.raises(ValueError, match="must count up from 0"):
        build_qwen_tokenizer(written("\n".join(lines[:300] + lines[301:])))
    with pytest.raises(ValueError, match="lacks the single bytes"):
        build_qwen_tokenizer(written("\n".join(lines[:200])))
    with pytest.raises(ValueError, match="not closed under merges"):
        build_qwen_tokenizer(written("\n".join([*lines[:256], "YWJj 256"])))  # "abc", without "ab" or "bc"
    for num_ranks in (255, 1025):
        with pytest.raises(ValueError, match=f"between 256 .* and 1024 .* but got {num_ranks}"):
            build_qwen_tokenizer(FIRST_RANKS, num_ranks=num_ranks)
