"""Coded samples: conversations whose pictures are codes already, the rows that the language model trains on.

The image tokenizer is frozen while the language model trains (arXiv 2601.02204), so pictures are encoded once and for
all. A row of a data set holds plain lists:

- `token_ids`: text ids with one `<image>` mark where each picture stands;
- `completion_mask`: 1 where the token, or the picture at the mark, is an answer to be learned, 0 where it is prompt;
- `codes`, `target_codes`: for each picture the codes that are seen and those that are to be predicted (they differ
  under self-correction);
- `image_grid_shw`: for each picture number of scales, bucket height and bucket width;
- `codebook_size`: of the image tokenizer that made the codes;

and, where there is a use for them,

- `image_tokenizer_hash`: of the codebooks (see `hash_image_tokenizer`), by which other tokenizers' codes are refused;
- `inverse_token_ids`, `inverse_completion_mask`: of a sample that draws from a text, the other way round: the picture
  is the prompt and the text the answer; empty for all other samples;
- `prompt_style`: "chat" or "bare", how the sample prompts the model (see `encode_messages`);
- `id`: any name, reported when something is wrong with the sample.

Letters: L slots of the token view, N codes of an image.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers.utils.chat_template_utils import render_jinja_template

from ..chat_template import read_messages
from ..codebook import hash_image_tokenizer
from ..configuration_nextflow import NextFlowConfig
from ..processing_nextflow import NextFlowProcessor
from ..token_fields import tokenize

CodedSample = dict[str, Any]
COLUMNS = ("token_ids", "completion_mask", "codes", "target_codes", "image_grid_shw", "codebook_size")


def coded_features() -> Features:
    """The columns of a coded data set."""
    names = ("token_ids", "inverse_token_ids", "completion_mask", "inverse_completion_mask")
    return Features(
        {name: List(Value("int32" if name.endswith("ids") else "int8")) for name in names}
        | {name: List(List(Value("int32"))) for name in ("codes", "target_codes", "image_grid_shw")}
        | {"codebook_size": Value("int32")}
        | {name: Value("string") for name in ("image_tokenizer_hash", "prompt_style", "id")}
    )


def load_coded_dataset(folder: str | Path) -> Dataset:
    """All shards (`*.arrow`) of a folder as one `datasets.Dataset`, in order, mapped from disk and not copied.

    Raises:
        `ValueError`: if there are none, or if one is damaged; it is named.
    """
    # What datasets keeps of `map` and `filter` stands beside the shards that they read.
    shards = sorted(path for path in Path(folder).glob("*.arrow") if not path.name.startswith("cache-"))
    if not shards:
        raise ValueError(f"{folder} has no shards (*.arrow) of coded samples; `examples/extract_codes.py` makes them.")
    return concatenate_datasets([open_shard(shard) for shard in shards])


def open_shard(path: Path) -> Dataset:
    """One shard as a `datasets.Dataset`; a `ValueError` names it if it is not whole."""
    try:
        return Dataset.from_file(str(path))
    except Exception as error:  # Arrow has many ways to fail
        raise ValueError(f"{path} is damaged ({error}). Delete it and run the extraction again.") from error


def encode_messages(
    messages: Sequence[dict[str, Any]],
    processor: NextFlowProcessor,
    self_correction: bool = False,
    generator: torch.Generator | None = None,
    caption_prompt: str = "",
    prompt_style: Literal["chat", "bare"] = "chat",
    **images_kwargs,
) -> CodedSample:
    """Makes a coded sample of a conversation in transformers' chat format.

    Args:
        messages (list of `dict`):
            `role` and `content`, a text or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image":
            picture}`. What an assistant says (text and pictures) is what is to be learned.
        processor ([`NextFlowProcessor`]): With its image tokenizer.
        self_correction (`bool`, *optional*, defaults to `False`): Draw some of the codes that are seen.
        generator (`torch.Generator`, *optional*): Source of those draws.
        caption_prompt (`str`, *optional*, defaults to `""`):
            What stands after the picture in the prompt of an inverted sample (see [`invert_task`]).
        prompt_style (`str`, *optional*, defaults to `"chat"`):
            `"chat"` writes turns by the chat template; `"bare"` only what is said, and the EOS after each answer.
        images_kwargs: Options of the image processor (`num_scales`, ...).

    Returns:
        `dict`: one row, as the head of this module describes it.

    Raises:
        `ValueError`: if an assistant says nothing, or an image part has no picture.
    """
    generators = None if generator is None else [generator]
    options: dict[str, Any] = {"caption_prompt": caption_prompt, "prompt_style": prompt_style, **images_kwargs}
    return encode_conversations([messages], processor, self_correction, generators, **options)[0]


def encode_conversations(
    conversations: Sequence[Sequence[dict[str, Any]]],
    processor: NextFlowProcessor,
    self_correction: bool = False,
    generators: Sequence[torch.Generator] | None = None,
    caption_prompt: str = "",
    prompt_style: Literal["chat", "bare"] = "chat",
    **images_kwargs,
) -> list[CodedSample]:
    """[`encode_messages`] of several conversations; pictures of one size are encoded together.

    `generators` has one for each conversation, which its pictures draw from: what a conversation draws does not depend
    on the others.
    """
    if prompt_style not in ("chat", "bare"):
        raise ValueError(f'`prompt_style` must be "chat" or "bare", but got {prompt_style!r}.')
    if prompt_style == "chat" and processor.chat_template is None:
        raise ValueError('This processor has no chat template: pass `prompt_style="bare"`.')
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    samples, pictures, sources = list[CodedSample](), list[Any](), list[torch.Generator]()
    for index, messages in enumerate(conversations):
        chat = read_messages(messages, special, [])
        own = [part.get("image") for message in chat for part in _parts(message) if part["type"] == "image"]
        _check_pictures(messages, own, processor.image_token)
        token_ids, completion_mask = _tokenize(chat, processor, prompt_style)
        if not any(completion_mask):
            raise ValueError("The conversation has nothing to learn: no message of an assistant.")
        inverse = _inverted(chat, caption_prompt)
        inverse_ids, inverse_mask = _tokenize(inverse, processor, prompt_style) if inverse else ([], [])
        samples.append(
            {
                "token_ids": token_ids,
                "completion_mask": completion_mask,
                "inverse_token_ids": inverse_ids,
                "inverse_completion_mask": inverse_mask,
                "prompt_style": prompt_style,
                "num_images": len(own),
            }
        )
        pictures += own
        sources += [_spawn(generators[index]) for _ in own] if generators else []
    encoded = processor._encode_images(pictures, self_correction, sources or None, images_kwargs)
    offset, tokenizer = processor.visual_token_offset or 0, processor.image_tokenizer
    remaining = zip(*encoded, strict=True)
    for sample in samples:
        images = [next(remaining) for _ in range(sample.pop("num_images"))]
        sample |= {
            "codes": [[code - offset for code in codes] for codes, _, _ in images],
            "target_codes": [[code - offset for code in targets] for _, targets, _ in images],
            "image_grid_shw": [grid for _, _, grid in images],
            "codebook_size": tokenizer.config.codebook_size if tokenizer else 0,
            "image_tokenizer_hash": hash_image_tokenizer(tokenizer) if tokenizer else "",
        }
    return samples


def _spawn(generator: torch.Generator) -> torch.Generator:
    """A source of draws for one picture, which no other picture's draws move."""
    seed = int(torch.randint(2**62, (), device=generator.device, generator=generator))
    return torch.Generator(generator.device).manual_seed(seed)


def _check_pictures(messages: Sequence[dict[str, Any]], pictures: list[Any], mark: str) -> None:
    if any(picture is None for picture in pictures):
        raise ValueError('A part {"type": "image"} needs its picture under "image".')
    texts = [part["text"] for message in messages for part in _parts(message) if part["type"] == "text"]
    if not pictures and any(mark in text for text in texts):
        raise ValueError(
            f"A text holds the mark {mark}, but the conversation has no picture. Put it in a part "
            '{"type": "image", "image": picture}.'
        )


def _tokenize(chat: list[dict[str, Any]], processor: NextFlowProcessor, style: str) -> tuple[list[int], list[int]]:
    """Ids of a conversation as `read_messages` gives it, with one mark per picture, and where an assistant speaks."""
    if style == "chat":
        options: dict[str, Any] = {"chat_template": processor.chat_template, "return_assistant_tokens_mask": True}
        options |= processor.tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(conversations=[chat], **options)
        prompts, answered = rendered
        encoded = tokenize(processor.tokenizer, prompts, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"][0]]
        return encoded["input_ids"][0], [int(any(a <= start < b for a, b in answered[0])) for start in starts]
    ids, mask = list[int](), list[int]()
    for message in chat:
        said = [part["text"] if part["type"] == "text" else processor.image_token for part in _parts(message)]
        if answers := message["role"] == "assistant":
            said.append(processor.tokenizer.eos_token)
        encoded = tokenize(processor.tokenizer, ["".join(said)], add_special_tokens=not ids)  # one <s> for Llama
        processor.cut_prompts(encoded)
        (new,) = encoded["input_ids"]
        ids, mask = ids + new, mask + [int(answers)] * len(new)
    return ids, mask


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _inverted(chat: list[dict[str, Any]], caption_prompt: str) -> list[dict[str, Any]] | None:
    """A picture drawn from a text as a picture described; None for any other conversation."""
    if [message["role"] for message in chat] != ["user", "assistant"]:
        return None
    texts, pictures = map(_parts, chat)
    if any(part["type"] != "text" for part in texts) or [part["type"] for part in pictures] != ["image"]:
        return None
    prompt = [{"type": "text", "text": caption_prompt}] if caption_prompt else []
    return [{"role": "user", "content": [*pictures, *prompt]}, {"role": "assistant", "content": texts}]


def invert_task(sample: CodedSample) -> CodedSample:
    """A sample that draws from a text as one that describes (task inversion); any other sample as it is."""
    if not sample.get("inverse_token_ids"):
        return sample
    return {**sample, **{name: sample[f"inverse_{name}"] for name in ("token_ids", "completion_mask")}}


def drop_condition(sample: CodedSample, image_token_id: int, bos_token_id: int | None = None) -> CodedSample:
    """The sample without the text of its prompt, as guidance's unconditional branch sees it; pictures stay."""
    slots = zip(sample["token_ids"], sample["completion_mask"], strict=True)
    kept = [(token, answer) for token, answer in slots if answer or token in (image_token_id, bos_token_id)]
    return {**sample, "token_ids": [token for token, _ in kept], "completion_mask": [answer for _, answer in kept]}


def check_columns(names: Iterable[str]) -> None:
    """Refuses rows that are not coded samples."""
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(
            f"The model trains on coded samples, whose columns are {', '.join(COLUMNS)}. These have the columns "
            f"{', '.join(names)}, without {', '.join(missing)}. Texts, conversations and pictures become coded "
            "samples by `encode_messages(messages, processor)`, whole data sets by examples/extract_codes.py."
        )


def check_codes(sizes: Iterable[int], hashes: Iterable[str | None], config: NextFlowConfig) -> str | None:
    """Refuses codes of another image tokenizer than the model's, whose hash it returns (None if it is not known).

    `sizes` are those of the codebooks; `hashes` may hold empty ones.
    """
    known = sorted(set(sizes))
    if known not in ([], [config.visual_codebook_size]):
        raise ValueError(
            f"The codes come from codebook{'s' * (len(known) > 1)} of {', '.join(map(str, known))} codes, but the "
            f"model's has {config.visual_codebook_size}. Extract all codes with the model's own image tokenizer."
        )
    theirs, ours = sorted({value for value in hashes if value}), getattr(config, "image_tokenizer_hash", None)
    if len({*theirs, ours} - {None}) > 1:
        raise ValueError(
            f"The codes come from the image tokenizer {', '.join(theirs)}"
            + (f", but the model was trained on codes of {ours}" if ours else "")
            + ". The same number means another picture: extract all codes with the model's own image tokenizer."
        )
    return theirs[0] if theirs else ours


def check_sample(sample: CodedSample, config: NextFlowConfig) -> list[tuple[list[int], list[int], list[int]]]:
    """Codes, targets and grid of each image of a sample; refuses one that does not fit together or to the model."""
    check_columns(sample)
    tokens, mask, *parts = (sample[name] for name in COLUMNS[:5])
    counts = [list(tokens).count(config.image_token_id), *map(len, parts)]
    if len(set(counts)) > 1:
        raise ValueError(
            "The sample has {} image marks, codes of {} images, targets of {}, grids of {}.".format(*counts)
        )
    images = list(zip(*parts, strict=True))
    if images:
        check_codes([sample["codebook_size"]], [sample.get("image_tokenizer_hash")], config)
    if not len(tokens) or len(mask) != len(tokens):
        raise ValueError(f"The sample has {len(tokens)} `token_ids` and a `completion_mask` of {len(mask)}.")
    _check_range("token_ids", tokens, config.text_vocab_size)
    _check_range("completion_mask", mask, 2)
    for codes, targets, grid in images:
        num_codes = config.schedule_of(grid).num_tokens
        if not len(codes) == len(targets) == num_codes:
            raise ValueError(
                f"An image of grid {tuple(grid)} has {num_codes} codes, but the sample has {len(codes)} and "
                f"{len(targets)} targets."
            )
        _check_range("codes", codes, config.visual_codebook_size)
        _check_range("target_codes", targets, config.visual_codebook_size)
    return images


def _check_range(name: str, values: Sequence[int], stop: int) -> None:
    if wrong := [value for value in (min(values), max(values)) if value not in range(stop)]:
        raise ValueError(f"`{name}` must be whole numbers from 0 to {stop - 1}, but hold {wrong[0]}.")


def expand_sample(
    sample: CodedSample, config: NextFlowConfig, completion_only: bool = True
) -> dict[str, list[int] | list[list[int]]]:
    """The token view of a coded sample.

    Args:
        sample (`dict`): One row, as the head of this module describes it.
        config ([`NextFlowConfig`]): The model's.
        completion_only (`bool`, *optional*, defaults to `True`): Learn answers only; False learns prompts, too.

    Returns:
        `dict` with `input_ids` and `labels`, both of length L, and `image_grid_shw`. Labels are the target codes and
        the text; -100 for what is not learned, and for the first token, which nothing predicts.

    Raises:
        `ValueError`: if the codes are another image tokenizer's, or don't fit their marks or grids.
    """
    images = check_sample(sample, config)
    offset, remaining = config.text_vocab_size, iter(images)
    input_ids, labels = list[int](), list[int]()
    for token, answer in zip(sample["token_ids"], sample["completion_mask"], strict=True):
        seen = wanted = [token]
        if token == config.image_token_id:
            codes, targets, _ = next(remaining)
            start = list(config.image_start_ids)
            seen = [*start, *(code + offset for code in codes), *config.image_end_ids]
            learned = start if config.writes_text else [-100] * len(start)
            wanted = [*learned, *(code + offset for code in targets), *config.image_end_ids]
        input_ids += seen
        labels += wanted if answer or not completion_only else [-100] * len(wanted)
    labels[:1] = [-100] * len(labels[:1])
    return {"input_ids": input_ids, "labels": labels, "image_grid_shw": [list(grid) for *_, grid in images]}
