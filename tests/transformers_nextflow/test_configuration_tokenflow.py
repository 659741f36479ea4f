"""TokenFlow's configuration: the published model by default, what does not fit together."""

import pytest

from transformers_nextflow import ScaleSchedule, TokenFlowConfig


def test_it_is_the_published_model_and_survives_saving(tmp_path):
    config = TokenFlowConfig(image_start_ids=[3, 4])
    assert config.schedule() == ScaleSchedule(num_scales=9, sides=(1, 2, 4, 6, 8, 10, 12, 14, 16))
    assert (config.schedule().num_tokens, config.schedule(256, 256).height) == (817, 256)
    config.save_pretrained(tmp_path)
    loaded = TokenFlowConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and (loaded.boi_token_id, loaded.num_scales) == (4, 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 64000}, "must be `text_vocab_size` . `visual_codebook_size`, 32001 . 32768"),
        ({"scale_sides": [2, 4]}, "`sides` must begin with 1"),
        ({"image_start_ids": [32001]}, "`image_start_ids` must be text ids, below 32001"),
        ({"image_end_ids": []}, "`image_end_ids` must be text ids"),
        ({"image_token_id": 40000}, "`image_token_id` must be text ids"),
        ({"tie_word_embeddings": True}, "`tie_word_embeddings` must be False"),
        ({"max_text_tokens": 0}, "`max_text_tokens` must be finite and between 1"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenFlowConfig(**fields)


@pytest.mark.parametrize("size", [(224, 224, None), (None, None, 8), (256, 128, None), (256, 256, 12)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="draws images of 256 x 256 pixels in 9 scales and no others"):
        TokenFlowConfig().schedule(*size)
