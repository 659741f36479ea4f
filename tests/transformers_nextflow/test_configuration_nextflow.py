import pytest
from transformers import AutoConfig, PreTrainedConfig

from transformers_nextflow import NextFlowConfig, NextFlowImageTokenizerConfig


def test_defaults_are_the_7b_model():
    config = NextFlowConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (3584, 28, 28)
    assert config.vocab_size == config.text_vocab_size + config.visual_codebook_size
    assert config.rope_parameters["mrope_section"] == [16, 24, 24]


def test_round_trips(tmp_path):
    config = NextFlowConfig(scale_reweight_alpha=0.5, num_scales=8, boi_token_id=7)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is NextFlowConfig and loaded.to_dict() == {**config.to_dict(), **_versions(loaded)}

    tokenizer_config = NextFlowImageTokenizerConfig(
        codebook_size=64, semantic_config={"hidden_size": 32, "num_hidden_layers": 1}
    )
    tokenizer_config.save_pretrained(tmp_path / "image_tokenizer")
    loaded = NextFlowImageTokenizerConfig.from_pretrained(tmp_path / "image_tokenizer")
    assert loaded.semantic_config.hidden_size == loaded.semantic_feature_dim == 32
    assert loaded.to_dict() == {**tokenizer_config.to_dict(), **_versions(loaded)}


def _versions(config):
    return {key: value for key, value in config.to_dict().items() if key in ("transformers_version", "_name_or_path")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"text_vocab_size": 100, "boi_token_id": 1, "eoi_token_id": 2, "image_token_id": 3},
            r"must be `text_vocab_size` \+",
        ),
        ({"num_scales": 19}, "between 1 and 18"),
        ({"visual_feature_mode": "summed"}, '"residual" or "accumulated"'),
        ({"boi_token_id": 152064}, "must be a text id"),
        ({"tie_word_embeddings": True}, "must be False"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be finite and between 1"),
        ({"num_hidden_layers": 2**40}, "`num_hidden_layers` must be finite and between 1 and 4096"),
        ({"num_key_value_heads": 3}, "multiple of `num_key_value_heads`"),
        ({"scale_reweight_alpha": float("nan")}, "`scale_reweight_alpha` must be finite"),
        ({"hidden_size": "3584"}, "'hidden_size' expected int, got str"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "`num_hidden_layers`"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": "abc"}}, "`mrope_section` 'abc'"),
        ({"hidden_size": 256, "num_attention_heads": 4}, r"`mrope_section` \[16, 24, 24\] must add up to 32"),
    ],
)
def test_bad_language_model_fields(arguments, message):
    with pytest.raises(ValueError, match=message):
        NextFlowConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_hidden_sizes": [32, 32]}, "give a stride of 2, but `stride` is 16"),
        (
            {"decoder_hidden_sizes": [32] * 5, "pixel_patch_size": 2, "encoder_hidden_sizes": [32] * 4},
            "`decoder_hidden_sizes` has 5",
        ),
        ({"self_correction_top_k": 0}, "`self_correction_top_k` must be finite and between 1"),
        ({"semantic_config": {"model_type": "no_such_model"}}, "unknown model type"),
        ({"scale_sides": [1, 2, 4]}, "`num_scales` must be between 1 and 3, but got 18"),
        ({"scale_sides": [2, 4], "num_scales": 2}, "must begin with 1 and grow"),
        ({"num_scales": 19}, "`num_scales` must be between 1 and 18"),
        ({"semantic_config": 5}, "`semantic_config` must be a dict or a config"),
        ({"self_correction_temperature": 0.0}, "`self_correction_temperature` must be finite and between"),
        ({"self_correction_token_fraction": 1.5}, "between 0 and 1, but got 1.5"),
        ({"encoder_hidden_sizes": [8, 0]}, r"`encoder_hidden_sizes` must be finite and between 1 .*\[8, 0\]"),
        ({"semantic_image_mean": [0.5] * 3}, "both `semantic_image_mean` and `semantic_image_std`"),
    ],
)
def test_bad_image_tokenizer_fields(arguments, message):
    with pytest.raises(ValueError, match=message):
        NextFlowImageTokenizerConfig(**arguments)


def test_a_field_is_checked_when_it_is_set_later():
    config = NextFlowConfig()
    with pytest.raises(ValueError, match=r"`num_scales` must be finite"):
        config.num_scales = 0
    assert config.num_scales == 18


def test_reading_it_as_any_configuration_warns_of_nothing(tmp_path, caplog):
    """As trainers do when they resume; that class knows nothing of `mrope_section`."""
    NextFlowConfig().save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="transformers"):
        PreTrainedConfig.from_json_file(tmp_path / "config.json")
    assert "Unrecognized keys" not in caplog.text
