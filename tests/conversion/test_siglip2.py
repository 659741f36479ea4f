"""SigLIP2 to the semantic encoder of an image tokenizer: every key, every bit, the same features."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionModel

from transformers_nextflow import NextFlowImageTokenizer, NextFlowImageTokenizerConfig

sys.path.insert(0, str(Path(__file__).parents[2]))
from conversion.siglip2 import convert_to_image_tokenizer, main, new_weights, plan_image_tokenizer
from conversion.streaming import StoredTensor, read_checkpoint

VISION = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_patches=36)
TEXT = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
TOKENIZER = dict(
    codebook_size=64,
    num_scales=6,
    pixel_patch_size=4,
    encoder_hidden_sizes=[8, 8, 8],
    decoder_hidden_sizes=[8, 8, 8],
    latent_channels=8,
    cnn_norm_groups=2,
    semantic_decoder_num_heads=2,
)


@pytest.fixture(params=["whole model", "vision tower"])
def source(request, tmp_path) -> tuple[Path, Siglip2VisionModel]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Siglip2Model(Siglip2Config(vision_config=VISION, text_config=TEXT)).bfloat16()
    vision = Siglip2VisionModel(model.config.vision_config).bfloat16()
    vision.load_state_dict({k.removeprefix("vision_model."): v for k, v in model.vision_model.state_dict().items()})
    (model if request.param == "whole model" else vision).save_pretrained(tmp_path / "source")
    return tmp_path / "source", vision


def test_the_encoder_is_kept_and_the_rest_is_fresh(source, tmp_path):
    folder, vision = source
    output = convert_to_image_tokenizer(folder, tmp_path / "out", **TOKENIZER)
    tokenizer = NextFlowImageTokenizer.from_pretrained(output)
    for name, weight in vision.state_dict().items():
        assert torch.equal(tokenizer.semantic_encoder.state_dict()[name], weight), name

    torch.manual_seed(0)
    fresh = NextFlowImageTokenizer(tokenizer.config)
    for name, ours in tokenizer.named_parameters():
        theirs = fresh.get_parameter(name)
        if not name.startswith("semantic_encoder") and theirs.numel() > 200:
            torch.testing.assert_close(ours.float().std(), theirs.std(), atol=0.0, rtol=0.4, msg=name)


def test_its_features_are_siglip2s(source, tmp_path):
    folder, vision = source
    tokenizer = NextFlowImageTokenizer.from_pretrained(
        convert_to_image_tokenizer(folder, tmp_path / "out", **TOKENIZER), dtype=torch.float32
    )
    pixels = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # SigLIP2's own patches: rows of the grid, then rows, columns and channels of a patch.
    patches = pixels.unflatten(3, (6, 16)).unflatten(2, (6, 16)).permute(0, 2, 4, 3, 5, 1).reshape(1, 36, -1)
    hidden = vision.float()(
        patches, torch.ones(1, 36, dtype=torch.long), torch.tensor([[6, 6]]), output_hidden_states=True
    ).hidden_states[-2]
    features = tokenizer.encode_semantic(pixels)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), hidden, atol=1e-5, rtol=1e-5)


def test_real_size_matches_both_ways():
    config = NextFlowImageTokenizerConfig()
    with torch.device("meta"):
        siglip = Siglip2Model(Siglip2Config(vision_config=config.semantic_config.to_dict()))
        expected = {name: tuple(t.shape) for name, t in NextFlowImageTokenizer(config).state_dict().items()}
    source = {k: StoredTensor(Path("x"), k, tuple(t.shape), torch.float32, 0) for k, t in siglip.state_dict().items()}
    new = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    new = {name: tensor for name, tensor in new.items() if not name.startswith("semantic_encoder.")}
    plan = {tensor.name: tensor.shape for tensor in plan_image_tokenizer(source, config, new)}
    assert plan == expected
    used = sum(name.startswith("vision_model.") for name in source)
    assert used == sum(name.startswith("semantic_encoder.") for name in expected)


def test_new_weights_are_all_but_the_encoder():
    config = NextFlowImageTokenizerConfig(semantic_config={"model_type": "siglip2_vision_model", **VISION}, **TOKENIZER)
    names = {name for name in NextFlowImageTokenizer(config).state_dict() if not name.startswith("semantic_encoder.")}
    weights = new_weights(config)
    assert weights.keys() == names
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_bad_input(source, tmp_path):
    folder, _ = source
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("post_layernorm.bias"))

    def refused(message: str, change):
        changed = dict(weights)
        change(changed)
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            convert_to_image_tokenizer(folder, tmp_path / "out", **TOKENIZER)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    refused('lacks the weights of "semantic_encoder.post_layernorm.bias"', lambda w: w.pop(name))
    refused('holds the key "extra", which no rule expects', lambda w: w.update(extra=torch.ones(1)))
    refused(r"has the shape \(17,\); .* \(16,\)", lambda w: w.update({name: torch.ones(17)}))
    refused('no place for "encoder.layers.2.x"', lambda w: w.update({"encoder.layers.2.x": torch.ones(1)}))
    (folder / "config.json").write_text('{"model_type": "siglip"}')
    refused('states the model type "siglip"; expected siglip2 or siglip2_vision_model', lambda w: None)


def test_bad_files(source, tmp_path):
    folder, _ = source
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'model.safetensors" is truncated or damaged: its header promises'):
        convert_to_image_tokenizer(folder, tmp_path / "out", **TOKENIZER)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds only pickled weights \(pytorch_model.bin\)"):
        convert_to_image_tokenizer(folder, tmp_path / "out", **TOKENIZER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_another_dtype_leaves_the_codebooks_alone(source, tmp_path):
    output = convert_to_image_tokenizer(source[0], tmp_path / "out", torch.float16, **TOKENIZER)
    dtypes = {name: tensor.dtype for name, tensor in read_checkpoint(output).items()}
    assert dtypes.pop("quantizer.semantic_codebook.weight") == torch.float32
    assert dtypes.pop("quantizer.pixel_codebook.weight") == torch.float32
    assert set(dtypes.values()) == {torch.float16}


def test_the_command_refuses_to_overwrite(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        main(["--source", str(source[0]), "--output", str(tmp_path / "out")])
    assert "is there already" in capsys.readouterr().err
