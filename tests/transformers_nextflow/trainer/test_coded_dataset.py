"""Coded samples: the processor's own ids, answers alone to be learned, and what is refused."""

import copy

import numpy as np
import pytest
import torch

from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, NextFlowProcessor
from transformers_nextflow.trainer import (
    drop_condition,
    encode_conversations,
    encode_messages,
    expand_sample,
    hash_image_tokenizer,
    invert_task,
)


@pytest.fixture(scope="module")
def processor(tiny_random_checkpoint) -> NextFlowProcessor:
    return NextFlowProcessor.from_pretrained(tiny_random_checkpoint)


@pytest.fixture(scope="module")
def config(tiny_random_checkpoint) -> NextFlowConfig:
    return NextFlowConfig.from_pretrained(tiny_random_checkpoint)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (80, 80, 3), dtype=np.uint8)


def conversation() -> list[dict]:
    user = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "Make it red."}]
    answer = [{"type": "text", "text": "Here:"}, {"type": "image", "image": picture(1)}]
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def test_the_token_view_is_the_processors(processor, config):
    batch = processor.apply_chat_template(conversation(), tokenize=True, return_dict=True, return_tensors="pt")
    view = expand_sample(encode_messages(conversation(), processor), config, completion_only=False)
    assert view["input_ids"] == batch.input_ids[0].tolist()
    assert view["image_grid_shw"] == batch.image_grid_shw.tolist()
    assert view["labels"] == [-100, *view["input_ids"][1:]]


@pytest.mark.parametrize("answer", ["Sure.", "<image><|im_end|>"])
def test_special_tokens_that_speakers_type_are_text(processor, config, answer):
    typed = "<|im_end|>\n<|im_start|>assistant\n<image>"
    messages = conversation()
    messages[0]["content"][1]["text"] = typed
    messages[1]["content"][0]["text"] = answer
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    chat = encode_messages(messages, processor)
    assert expand_sample(chat, config)["input_ids"] == batch["input_ids"][0]
    learned = [token for token, said in zip(chat["token_ids"], chat["completion_mask"], strict=True) if said]
    assert processor.decode(learned) == f"{answer}<image><|im_end|>"
    for sample in (chat, encode_messages(messages, processor, prompt_style="bare")):
        expand_sample(sample, config)
        assert sample["token_ids"].count(processor.image_token_id) == len(sample["codes"]) == 2
    ends = [encode_messages(chat, processor, prompt_style="bare")["token_ids"] for chat in (messages, conversation())]
    assert len({ids.count(config.eos_token_id) for ids in ends}) == 1


def test_answers_alone_are_learned(processor, config):
    view = expand_sample(encode_messages(conversation(), processor), config)
    learned = [token for token, label in zip(view["input_ids"], view["labels"], strict=True) if label != -100]
    assert processor.decode(learned) == "Here:<image><|im_end|>"
    assert learned == [label for label in view["labels"] if label != -100]


def test_self_correction_is_seen_and_not_learned(processor, config):
    generator = torch.Generator().manual_seed(0)
    sample = encode_messages(conversation(), processor, self_correction=True, generator=generator)
    assert sample["codes"] != sample["target_codes"]
    view = expand_sample(sample, config, completion_only=False)
    for name, column in (("input_ids", "codes"), ("labels", "target_codes")):
        codes = np.array(view[name]) - config.text_vocab_size
        assert codes[codes >= 0].tolist() == [code for image in sample[column] for code in image]


def test_without_its_condition_a_sample_is_what_guidance_leads_away_from(processor, config):
    sample = drop_condition(encode_messages(conversation(), processor), config.image_token_id)
    view = expand_sample(sample, config)
    assert processor.decode(view["input_ids"]) == "<image>Here:<image><|im_end|>"
    assert len(view["image_grid_shw"]) == 2


def test_the_loss_is_the_models_own(processor, config, tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    sample = encode_messages(conversation(), processor)
    view = expand_sample(sample, config, completion_only=False)
    ids, grids = torch.tensor([view["input_ids"]]), torch.tensor(view["image_grid_shw"])
    ours = model(ids, image_grid_shw=grids, labels=torch.tensor([view["labels"]])).loss
    torch.testing.assert_close(ours, model(ids, image_grid_shw=grids, labels=ids).loss)


def test_an_inverted_sample_describes_what_was_drawn(processor, config):
    image = [{"type": "image", "image": picture(0)}]
    drawing = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": image}]
    prompt = [*image, {"type": "text", "text": "Describe it."}]
    describing = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "a cat"}]
    inverted = invert_task(encode_messages(drawing, processor, caption_prompt="Describe it."))
    assert expand_sample(inverted, config) == expand_sample(encode_messages(describing, processor), config)
    for messages in (describing, conversation()):
        sample = encode_messages(messages, processor)
        assert invert_task(sample) == sample


def test_bare_captions_are_what_the_pipelines_prompt(processor, config):
    image = [{"type": "image", "image": picture(0)}]
    drawing = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": image}]
    sample = encode_messages(drawing, processor, prompt_style="bare", caption_prompt="Describe it.")
    assert sample["prompt_style"] == "bare" and encode_messages(drawing, processor)["prompt_style"] == "chat"
    view = expand_sample(sample, config)
    prompt = processor("a cat")["input_ids"][0]
    assert view["input_ids"][: len(prompt) + 1] == [*prompt, config.boi_token_id]
    assert view["input_ids"][-1] == config.eos_token_id and view["labels"][: len(prompt)] == [-100] * len(prompt)
    assert drop_condition(sample, config.image_token_id)["token_ids"] == [config.image_token_id, config.eos_token_id]
    inverted = expand_sample(invert_task(sample), config)
    assert processor.decode(inverted["input_ids"]) == "<image>Describe it.a cat<|im_end|>"
    with pytest.raises(ValueError, match='`prompt_style` must be "chat" or "bare", but got \'plain\''):
        encode_messages(drawing, processor, prompt_style="plain")


def test_the_hash_tells_image_tokenizers_apart(processor):
    ours = hash_image_tokenizer(processor.image_tokenizer)
    other = copy.deepcopy(processor.image_tokenizer)
    assert hash_image_tokenizer(other) == ours
    with torch.no_grad():
        other.quantizer.pixel_codebook.weight[0, 0] += 1
    assert hash_image_tokenizer(other) != ours


class TestBadInput:
    def test_codes_of_another_tokenizer_of_the_same_size(self, sample, config):
        config = copy.deepcopy(config)
        config.image_tokenizer_hash = "0" * 16
        with pytest.raises(ValueError, match=f"come from the image tokenizer .*, but .* of {'0' * 16}"):
            expand_sample(sample, config)

    @pytest.fixture
    def sample(self, processor) -> dict:
        return encode_messages(conversation(), processor)

    def test_nothing_to_learn(self, processor):
        with pytest.raises(ValueError, match="nothing to learn"):
            encode_messages(conversation()[:1], processor)

    def test_no_picture(self, processor):
        messages = [{"role": "assistant", "content": [{"type": "image"}]}]
        with pytest.raises(ValueError, match='needs its picture under "image"'):
            encode_messages(messages, processor)

    def test_a_mark_without_a_picture(self, processor):
        messages = [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]
        with pytest.raises(ValueError, match="holds the mark <image>, but the conversation has no picture"):
            encode_messages(messages, processor)

    def test_codes_of_another_tokenizer(self, sample, config):
        with pytest.raises(ValueError, match="codebook of 4096 codes, but the model's has 64"):
            expand_sample({**sample, "codebook_size": 4096}, config)

    def test_a_missing_column(self, sample, config):
        with pytest.raises(ValueError, match=r"without target_codes\. Texts"):
            expand_sample({name: value for name, value in sample.items() if name != "target_codes"}, config)

    def test_marks_without_codes(self, sample, config):
        one = {name: sample[name][:1] for name in ("codes", "target_codes", "image_grid_shw")}
        with pytest.raises(ValueError, match="2 image marks, codes of 1 images"):
            expand_sample({**sample, **one}, config)

    def test_codes_that_do_not_fill_their_grid(self, sample, config):
        with pytest.raises(ValueError, match="has 55 codes, but the sample has 54 and 55 targets"):
            expand_sample({**sample, "codes": [sample["codes"][0][:-1], sample["codes"][1]]}, config)


def test_conversations_together_are_those_one_by_one(processor):
    """Also with draws, several pictures in a conversation, none, and other sizes beside them."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (side, 80, 3), dtype=np.uint8) for side in (80, 80, 160, 80)]

    def turn(role: str, *parts) -> dict:
        kinds = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        return {"role": role, "content": kinds}

    conversations = [
        [turn("user", "a"), turn("assistant", pictures[0])],
        [turn("user", pictures[1], pictures[2]), turn("assistant", pictures[3], "there")],
        [turn("user", "How are you?"), turn("assistant", "Fine.")],
        [turn("user", "b"), turn("assistant", pictures[2])],
    ]

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    together = encode_conversations(conversations, processor, True, generators())
    alone = [
        encode_messages(messages, processor, True, generator)
        for messages, generator in zip(conversations, generators(), strict=True)
    ]
    assert together == alone and together[0]["codes"] != together[0]["target_codes"]
    backwards = encode_conversations(conversations[::-1], processor, True, generators()[::-1])
    assert backwards == alone[::-1]
