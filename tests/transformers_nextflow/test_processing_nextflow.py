"""The processor: marks and pictures to the token view and back, chats, padding, loading and saving, bad input."""

import copy
import json
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, Qwen2Tokenizer

from transformers_nextflow import (
    NextFlowGenerateOutput,
    NextFlowImageProcessor,
    NextFlowProcessor,
    ScaleSchedule,
    processing_nextflow,
)

SCHEDULE = ScaleSchedule(num_scales=5)  # 80 x 80 pixels, 55 codes
N = SCHEDULE.num_tokens


@pytest.fixture(scope="module")
def processor(tiny_random_checkpoint) -> NextFlowProcessor:
    return NextFlowProcessor.from_pretrained(tiny_random_checkpoint)


@pytest.fixture
def text_only(processor) -> NextFlowProcessor:
    return NextFlowProcessor(processor.image_processor, processor.tokenizer)


def picture(seed: int = 0, size: tuple[int, int] = (80, 80)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer(text).input_ids


def codes_of(processor, image: Image.Image) -> list[int]:
    """The visual ids of one picture, step by step."""
    inputs = processor.image_processor(image, return_tensors="pt")
    codes = processor.image_tokenizer.encode(inputs.pixel_values, inputs.image_grid_shw).codes[0]
    return (codes + processor.visual_token_offset).tolist()


# Text and pictures to ids


def test_text_alone_is_the_tokenizer_s(processor):
    texts = ["a cat", "two dogs and a bird"]
    batch = processor(texts, padding=True, return_tensors="pt")
    expected = processor.tokenizer(texts, padding=True, return_tensors="pt")
    assert isinstance(batch, BatchFeature) and set(batch) == {"input_ids", "attention_mask"}
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(batch.attention_mask, expected.attention_mask)
    assert processor("a cat").input_ids == [ids_of(processor, "a cat")]


def test_a_mark_becomes_boi_and_codes(processor):
    batch = processor("A <image>: draw it", images=picture(), return_tensors="pt")
    boi = processor.tokenizer.boi_token_id
    codes = codes_of(processor, picture())
    assert len(codes) == N
    assert batch.input_ids[0].tolist() == [
        *ids_of(processor, "A "),
        boi,
        *codes,
        *ids_of(processor, ": draw it"),
    ]
    assert batch.image_grid_shw.tolist() == [[5, 16, 16]] and batch.image_grid_shw.dtype == torch.int64
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert (batch.attention_mask == 1).all()


def test_batch_is_padded_on_the_left_and_grids_are_in_reading_order(processor):
    pictures = [picture(0, (80, 80)), picture(1, (120, 60)), picture(2, (60, 90))]
    texts = ["<image> and <image>", "no picture", "x<image>"]
    batch = processor(texts, images=pictures, padding=True, return_tensors="pt")
    grids = [[5, 16, 16], [5, 11, 22], [5, 19, 13]]
    assert batch.image_grid_shw.tolist() == grids
    for row, (text, images) in enumerate(zip(texts, [pictures[:2], [], pictures[2:]], strict=True)):
        alone = processor(text, images=images or None).input_ids[0]
        assert batch.input_ids[row].tolist()[-len(alone) :] == alone
        assert batch.attention_mask[row].tolist() == [0] * (batch.input_ids.shape[1] - len(alone)) + [1] * len(alone)
    # Lists for each text say the same.
    nested = processor(texts, images=[pictures[:2], [], pictures[2:]], padding=True, return_tensors="pt")
    assert torch.equal(nested.input_ids, batch.input_ids)


def test_pictures_of_one_size_may_have_different_schedules(processor):
    """Coarse grids are shared: both come out at 80 x 80 pixels, of two buckets."""
    pictures = [picture(0, (160, 160)), picture(1, (150, 160))]
    batch = processor(["<image>", "<image>"], images=pictures, padding=True, return_tensors="pt")
    assert len(batch.image_grid_shw.unique(dim=0)) == 2
    for row, image in enumerate(pictures):
        alone = processor("<image>", images=image).input_ids[0]
        assert batch.input_ids[row, -len(alone) :].tolist() == alone
    decoded = processor.decode_images(batch.input_ids, batch.image_grid_shw)
    assert [[image.size for image in row] for row in decoded] == [[(80, 80)]] * 2


def test_padding_options(processor):
    texts, options = ["<image>", "hello"], {"images": picture(), "padding": "max_length", "max_length": 64}
    right = processor(texts, **options, padding_side="right", return_tensors="pt")
    assert right.input_ids.shape == (2, 64)
    assert right.attention_mask[:, 0].tolist() == [1, 1] and right.attention_mask[:, -1].tolist() == [0, 0]
    assert processor(
        texts, images=picture(), padding=True, pad_to_multiple_of=32, return_tensors="np"
    ).input_ids.shape == (
        2,
        64,
    )
    with pytest.raises(ValueError, match="padding"):
        processor(texts, images=picture(), return_tensors="pt")


def test_options_of_the_image_processor(processor):
    batch = processor("<image>", images=picture(size=(300, 300)), num_scales=4, return_tensors="pt")
    assert batch.image_grid_shw.tolist() == [[4, 16, 16]]
    batch = processor("<image>", images=picture(size=(300, 300)), height=48, width=64)
    assert batch.image_grid_shw == [list(ScaleSchedule.from_size(48, 64).grid_shw)]
    batch = processor("<image>", images=picture(size=(300, 300)), images_kwargs={"num_scales": 3})
    assert batch.image_grid_shw == [[3, 16, 16]]


def test_a_size_without_a_picture_is_warned_of(processor):
    """A pipeline hands `height` and `width` to the processor unless they are in its `generate_kwargs`."""
    with mock.patch.object(processing_nextflow.logger, "warning_once") as warn:
        processor("a cat", height=64, width=64)
        processor("<image>", images=picture(), height=64, width=64)
    assert warn.call_count == 1 and "generate_kwargs" in warn.call_args.args[0]


def test_self_correction(processor):
    texts, images = ["<image> a", "text"], [picture()]
    seed = torch.Generator().manual_seed
    batch = processor(texts, images, self_correction=True, generator=seed(0), padding=True, return_tensors="pt")
    visual = batch.input_ids >= processor.visual_token_offset
    drawn = batch.input_ids[visual] != batch.labels[visual]
    assert 0.2 < drawn.float().mean() < 1
    text = ~visual & batch.attention_mask.bool()
    assert torch.equal(batch.labels[text], batch.input_ids[text])
    assert (batch.labels[batch.attention_mask == 0] == -100).all()
    # Row by row as the tokenizer does it, and repeatable.
    inputs = processor.image_processor(images, return_tensors="pt")
    encoded = processor.image_tokenizer.encode(inputs.pixel_values, self_correction=True, generator=seed(0))
    assert torch.equal(batch.input_ids[visual], encoded.codes[0] + processor.visual_token_offset)
    assert torch.equal(batch.labels[visual], encoded.target_codes[0] + processor.visual_token_offset)


def test_truncation_cuts_text_but_no_picture(processor):
    texts = ["<image>", "a rather long text that says nothing at all, and goes on and on until it is long enough"]
    batch = processor(texts, images=picture(), truncation=True, max_length=N + 1)
    assert [len(ids) for ids in batch.input_ids] == [N + 1, N + 1]
    assert len(processor(texts, truncation="do_not_truncate", images=picture(), max_length=9).input_ids[1]) > N + 1
    with pytest.raises(ValueError, match=r"Text 0 takes 56 tokens with its pictures, more than `max_length` \(50\)"):
        processor(texts, images=picture(), truncation=True, max_length=50)


def test_chat(processor):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Draw it again."},
    ]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>user\n<image>What is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nDraw it again.<|im_end|>\n<|im_start|>assistant\n"
    )
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    assert torch.equal(batch.input_ids, processor(rendered, images=picture(), return_tensors="pt").input_ids)
    assert processor.decode(batch.input_ids[0]) == rendered

    batch = processor.apply_chat_template(
        [messages, messages[1:]], return_assistant_tokens_mask=True, processor_kwargs={"padding": True}, **options
    )
    assert batch.image_grid_shw.tolist() == [[5, 16, 16]]
    for row in range(2):
        said = batch.input_ids[row][batch.assistant_masks[row].bool()]
        assert processor.decode(said) == "A cat.<|im_end|>"


# Ids to text and pictures


def test_decode_prints_one_mark_an_image(processor):
    texts = ["<image><image> a <image>b", "plain"]
    batch = processor(texts, images=[picture(0), picture(1), picture(2)], padding=True, return_tensors="pt")
    pad = processor.tokenizer.pad_token
    assert processor.batch_decode(batch.input_ids)[0] == texts[0]
    assert processor.batch_decode(batch.input_ids)[1].replace(pad, "") == "plain"
    assert processor.decode(batch.input_ids) == processor.batch_decode(batch.input_ids)
    assert processor.decode(batch.input_ids, skip_special_tokens=True) == [" a b", "plain"]
    for same in (batch.input_ids[0], batch.input_ids[0].tolist(), batch.input_ids[0].numpy()):
        assert processor.decode(same) == texts[0]
    # What a model adds to a prompt that ends with <boi> has no <boi> of its own.
    assert processor.decode([*codes_of(processor, picture()), *ids_of(processor, "!")]) == "<image>!"
    assert processor.decode(ids_of(processor, "draw <boi>")) == "draw <boi>"
    assert processor.decode(ids_of(processor, "a")[0]) == "a" and processor.batch_decode([]) == []


def test_decode_images(processor):
    texts = ["<image> to <image>", "none", "<image>"]
    pictures = [picture(0), picture(1, (120, 60)), picture(2)]
    batch = processor(texts, images=pictures, padding=True, return_tensors="pt")
    decoded = processor.decode_images(batch.input_ids, batch.image_grid_shw)
    assert [[image.size for image in row] for row in decoded] == [[(80, 80), (112, 48)], [], [(80, 80)]]
    for image, row, column in ((0, 0, 0), (1, 0, 1), (2, 2, 0)):
        inputs = processor.image_processor(pictures[image], return_tensors="pt")
        codes = processor.image_tokenizer.encode(inputs.pixel_values, inputs.image_grid_shw).codes
        (expected,) = processor.image_processor.postprocess(
            processor.image_tokenizer.decode(codes, inputs.image_grid_shw)
        )
        np.testing.assert_allclose(np.asarray(decoded[row][column]), np.asarray(expected), atol=1)
    # One sequence alone, as a list.
    (row,) = processor.decode_images(batch.input_ids[2].tolist(), batch.image_grid_shw[2:])
    assert np.array_equal(np.asarray(row[0]), np.asarray(decoded[2][0]))
    assert processor.decode_images(batch.input_ids[1], []) == [[]]


def test_decode_images_of_a_prefix_is_a_preview(processor):
    batch = processor("<image>", images=picture(), return_tensors="pt")
    for num_scales, end in enumerate(SCHEDULE.offsets[1:], start=1):
        ((preview,),) = processor.decode_images(batch.input_ids[:, : end + 1], batch.image_grid_shw)
        assert preview.size == (80, 80), num_scales
    with pytest.raises(ValueError, match=r"Image 0 has 20 codes, but its grid \(5, 16, 16\) has 55, and only whole"):
        processor.decode_images(batch.input_ids[:, :21], batch.image_grid_shw)


def test_post_process_multimodal_output(processor):
    batch = processor(["<image>", "<image>"], images=[picture(0), picture(1)], return_tensors="pt")
    assert processor.post_process_multimodal_output(batch.input_ids, skip_special_tokens=False) == ["<image>"] * 2
    assert processor.post_process_image_text_to_text(batch.input_ids) == ["", ""]
    output = NextFlowGenerateOutput(
        image_codes=batch.input_ids[:, 1:] - processor.visual_token_offset, image_grid_shw=batch.image_grid_shw
    )
    images = processor.post_process_multimodal_output(output, generation_mode="image")
    expected = [row[0] for row in processor.decode_images(batch.input_ids, batch.image_grid_shw)]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    with pytest.raises(ValueError, match=r"Image mode needs codes and grids: pass `model\.decode_image_tokens"):
        processor.post_process_multimodal_output(batch.input_ids, generation_mode="image")
    with pytest.raises(ValueError, match='must be "text" or "image", but got "audio"'):
        processor.post_process_multimodal_output(batch.input_ids, generation_mode="audio")


# Saving and loading


def test_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "image_tokenizer" / "model.safetensors").is_file()
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["visual_token_offset"] == processor.visual_token_offset
    assert saved["processor_class"] == "NextFlowProcessor"
    assert "image_tokenizer" not in saved
    for loaded in (NextFlowProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is NextFlowProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.chat_template == processor.chat_template
        arguments = {"text": "<image>a", "images": picture()}
        assert loaded(**arguments).input_ids == processor(**arguments).input_ids
    without = NextFlowProcessor.from_pretrained(tmp_path, image_tokenizer=None)
    assert without.image_tokenizer is None and without.visual_token_offset == processor.visual_token_offset
    given = NextFlowProcessor.from_pretrained(
        tmp_path, image_tokenizer=processor.image_tokenizer, visual_token_offset=9
    )
    assert given.image_tokenizer is processor.image_tokenizer and given.visual_token_offset == 9


def test_round_trip_without_image_tokenizer(text_only, tmp_path):
    text_only.save_pretrained(tmp_path)
    loaded = NextFlowProcessor.from_pretrained(tmp_path)
    assert loaded.image_tokenizer is None and loaded.visual_token_offset is None
    assert loaded("a cat").input_ids == text_only("a cat").input_ids


def test_an_image_tokenizer_with_schedules_of_its_own_is_refused(processor):
    image_tokenizer = copy.copy(processor.image_tokenizer)
    image_tokenizer.config = copy.copy(image_tokenizer.config)
    image_tokenizer.config.scale_sides, image_tokenizer.config.image_size = [1, 2, 4], 64
    message = r"`scale_sides` and `image_size` in its configuration.*from_pretrained\(path, scale_sides=None"
    with pytest.raises(ValueError, match=message):
        NextFlowProcessor(processor.image_processor, processor.tokenizer, image_tokenizer)


def test_own_chat_template_survives(processor, tmp_path):
    own = NextFlowProcessor(processor.image_processor, processor.tokenizer, chat_template="{{ messages[0].content }}")
    own.save_pretrained(tmp_path)
    loaded = NextFlowProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"


def test_weights_are_not_copied_into_dicts(processor):
    assert "image_tokenizer" not in processor.to_dict()
    assert "image_tokenizer" not in repr(processor)
    assert processor.image_tokenizer is not None
    assert copy.copy(processor).image_tokenizer is processor.image_tokenizer


def test_model_input_names(processor):
    batch = processor("<image>", images=picture())
    assert set(processor.model_input_names) == set(batch)


# Bad input


def test_number_of_marks_and_pictures(processor):
    images = [picture(), picture()]
    for text, wrong in (("<image>", 1), (["a", "<image><image><image>"], 3)):
        with pytest.raises(
            ValueError, match=f"`text` has {wrong} `<image>` marks, but there are 2 images .`images`.. Put one"
        ):
            processor(text, images=images)
    with pytest.raises(ValueError, match="`text` has 0 `<image>` marks, but there are 1 images"):
        processor("a", images=picture())
    for no_images in (None, []):
        with pytest.raises(ValueError, match=r"`text` has 1 `<image>` marks, but there are 0 images"):
            processor("<image>", images=no_images)
    message = r"The texts have \[1, 1\] `<image>` marks, but the lists of `images` have \[2, 0\] pictures"
    with pytest.raises(ValueError, match=message):
        processor(["<image>", "<image>"], images=[images, []])
    with pytest.raises(ValueError, match=r"lists of `images` have \[1\] pictures. Pass one list a text"):
        processor(["<image>", "<image>"], images=[images[:1]])


def test_no_image_tokenizer_or_offset(processor, text_only):
    with pytest.raises(ValueError, match="has no image tokenizer, so it can neither read nor draw pictures"):
        text_only("<image>", images=picture())
    with pytest.raises(ValueError, match="has no image tokenizer"):
        text_only.decode_images([[1, 2]], [])
    no_offset = NextFlowProcessor(processor.image_processor, processor.tokenizer, processor.image_tokenizer)
    with pytest.raises(ValueError, match=r"has no `visual_token_offset`.* `config\.text_vocab_size`"):
        no_offset("<image>", images=picture())


def test_more_scales_than_the_image_tokenizer_has(processor):
    with pytest.raises(ValueError, match="take 8 scales, but this tokenizer has 5"):
        processor("<image>", images=picture(), num_scales=8)


def test_grids_and_codes_that_do_not_fit(processor):
    batch = processor("<image>", images=picture(), return_tensors="pt")
    with pytest.raises(ValueError, match="There are codes of 1 images, but `image_grid_shw` has 2 rows"):
        processor.decode_images(batch.input_ids, batch.image_grid_shw.repeat(2, 1))
    with pytest.raises(ValueError, match="There are codes of 0 images, but `image_grid_shw` has 1 rows"):
        processor.decode_images(batch.input_ids[:, :1], batch.image_grid_shw)
    foreign = batch.input_ids.clone()
    foreign[0, 5] += 64
    with pytest.raises(ValueError, match=r"Codes must lie in \[0, 64\)"):
        processor.decode_images(foreign, batch.image_grid_shw)


def test_other_bad_arguments(processor):
    for text in (None, [], [["a"]], 3):
        with pytest.raises(ValueError, match="`text` must be a string or a list of strings"):
            processor(text)
    with pytest.raises(ValueError, match='For a picture alone pass its mark: text="<image>"'):
        processor(images=picture())
    with pytest.raises(ValueError, match="`audio` must be None"):
        processor("a", audio=[0])


def test_a_system_message_has_no_picture(processor):
    chat = [{"role": "system", "content": [{"type": "image"}]}, {"role": "user", "content": "hi"}]
    with pytest.raises(Exception, match="A system message is text"):
        processor.apply_chat_template(chat, tokenize=False)


def test_a_video_is_its_frames(processor):
    frames = [picture(seed) for seed in range(5)]
    read = processor(
        "see <video>, then <image>", images=[picture(9)], videos=[frames], num_frames=3, return_tensors="pt"
    )
    written = processor(
        "see <image><image><image>, then <image>",
        images=[frames[0], frames[2], frames[4], picture(9)],
        return_tensors="pt",
    )
    assert torch.equal(read.input_ids, written.input_ids)
    array = np.stack([np.asarray(frame) for frame in frames[:2]])
    assert len(processor("<video>", videos=array, return_tensors="pt").image_grid_shw) == 2  # a shorter one, whole
    chat = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what happens?"}]}], tokenize=False
    )
    assert "<video>what happens?" in chat
    content = [
        {"type": "video", "video": frames},
        {"type": "video", "video": frames[:1]},
        {"type": "text", "text": "?"},
    ]
    turn = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt", num_frames=3
    )
    assert len(turn["image_grid_shw"]) == 4
    for text, videos in (("<video><video>", [frames]), ("no mark", [frames])):
        with pytest.raises(ValueError, match=r"`<video>` marks, but there are 1 videos"):
            processor(text, videos=videos)
    with pytest.raises(ValueError, match="`num_frames` must be at least 1"):
        processor("<video>", videos=[frames], num_frames=0)


def test_segments_are_text_and_pictures_in_order(processor):
    batch = processor(["<image>one<image>", "two"], images=[picture(0), picture(1)], padding=True, return_tensors="pt")
    first, second = processor.decode_segments(batch.input_ids, batch.image_grid_shw)
    assert [isinstance(segment, str) for segment in first] == [False, True, False] and first[1] == "one"
    assert second == ["two"]


def test_a_tokenizer_without_the_marks():
    tokenizer = Qwen2Tokenizer(vocab={"a": 0}, merges=[])
    with pytest.raises(ValueError, match=r"The tokenizer does not know `<image>`.*conversion/qwen_tokenizer\.py"):
        NextFlowProcessor(NextFlowImageProcessor(), tokenizer)
    with pytest.raises(TypeError, match="NoneType"):
        NextFlowProcessor(tokenizer=tokenizer)


def test_segments_and_videos_that_do_not_fit_are_explained(processor):
    ids = processor("<image>x", images=[picture(9)], return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="There are codes of 1 images, but `image_grid_shw` has 0 rows"):
        processor.decode_segments(ids, torch.empty(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="`videos` holds an object of type Image"):
        processor("<video>", videos=picture(9))
    with pytest.raises(ValueError, match="use `decode_images"):
        processor.post_process_interleaved(NextFlowGenerateOutput(sequences=ids), 1)
