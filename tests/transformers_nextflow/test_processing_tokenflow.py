"""TokenFlow's processor: text that opens and closes an image, prompts that are too long, what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_nextflow import NextFlowProcessor, NextFlowSession, TokenFlowForCausalLM, TokenFlowProcessor

START, END = [5, 6, 7], [9, 10]


@pytest.fixture(scope="module")
def processor(tiny_tokenflow_checkpoint) -> TokenFlowProcessor:
    return TokenFlowProcessor.from_pretrained(tiny_tokenflow_checkpoint, dtype=torch.float32)


def test_a_picture_stands_between_the_texts_that_open_and_close_it(processor):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    batch = processor("a cat<image>", images=[picture], return_tensors="pt")
    (ids,) = batch.input_ids.tolist()
    assert ids[0] == 1 and ids[-32 - 3 : -32] == START and ids[-2:] == END
    assert batch.image_grid_shw.tolist() == [[4, 16, 16]]
    assert min(ids[-32:-2]) >= processor.visual_token_offset == 33
    assert processor.decode(batch.input_ids[0]).startswith("<s> a cat<image>")
    ((segment, decoded, _),) = processor.decode_segments(batch.input_ids, batch.image_grid_shw)
    assert segment.startswith("a cat") and decoded.size == (64, 64)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(processor, caplog, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 4)
    short, long = processor(["a b", "a bad cat"]).input_ids
    assert len(long) == 4 and len(short) <= 4
    picture = Image.new("RGB", (64, 64))
    (with_image,) = processor("a bad cat<image>", images=[picture]).input_ids
    assert with_image[:4] == long and with_image[4:7] == START and len(with_image) == 4 + 3 + 30 + 2
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "Text 1 has 10 tokens",
        "The text has 10 tokens",
    ]
    assert "but TokenFlow reads 4 of one: the last 6 are cut off, from 'ad cat' on" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.apply_chat_template([{"role": "user", "content": "a cat"}]), "has no chats: pass the text itself"),
        (lambda p: p.style_prompt("a cat", style="chat"), "reads plain texts"),
        (lambda p: p.style_prompt("a cat", task="thinking"), "reads plain texts"),
        (
            lambda p: p("<image>", images=[Image.new("RGB", (9, 9))], num_scales=3),
            "have 64 x 64 pixels: leave out num_scales",
        ),
        (lambda p: TokenFlowProcessor(p.image_processor, p.tokenizer, chat_template="x"), "leave `chat_template` out"),
        (lambda p: NextFlowProcessor(p.image_processor, p.tokenizer), "does not know `<image>`"),
    ],
)
def test_what_is_refused(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)


def test_there_are_no_conversations(processor, tiny_tokenflow_checkpoint):
    model = TokenFlowForCausalLM.from_pretrained(tiny_tokenflow_checkpoint)
    with pytest.raises(ValueError, match="It never writes text"):
        NextFlowSession(model, processor)
