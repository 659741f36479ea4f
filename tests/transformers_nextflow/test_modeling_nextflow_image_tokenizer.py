import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

from transformers_nextflow import NextFlowImageTokenizer, NextFlowImageTokenizerConfig, ScaleSchedule, aspect_buckets
from transformers_nextflow.semantic_branch import resize_positions


def tiny_config(**settings) -> NextFlowImageTokenizerConfig:
    return NextFlowImageTokenizerConfig(
        **{
            "codebook_size": 32,
            "semantic_code_dim": 6,
            "pixel_code_dim": 4,
            "num_scales": 18,
            "semantic_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_patches": 16,
            },
            "semantic_feature_dim": 12,
            "semantic_decoder_hidden_size": 16,
            "semantic_decoder_layers": 1,
            "semantic_decoder_num_heads": 2,
            "pixel_patch_size": 8,
            "encoder_hidden_sizes": [8, 8],
            "encoder_num_res_blocks": 1,
            "decoder_hidden_sizes": [8, 8],
            "decoder_num_res_blocks": 1,
            "latent_channels": 8,
            "cnn_norm_groups": 4,
            "self_correction_top_k": 4,
            **settings,
        }
    )


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return NextFlowImageTokenizer(tiny_config()).eval()


def pictures(schedule: ScaleSchedule, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(batch_size, 3, schedule.height, schedule.width, generator=torch.Generator().manual_seed(seed))
    return 2 * noise - 1


@pytest.mark.parametrize("bucket", aspect_buckets())
def test_every_bucket_encodes_and_decodes(tokenizer, bucket):
    schedule = ScaleSchedule(bucket, 8)
    rows = torch.tensor([schedule.grid_shw])
    encoded = tokenizer.encode(pictures(schedule), rows)
    assert encoded.codes.shape == (1, schedule.num_tokens) and encoded.codes.dtype == torch.int64
    assert encoded.image_grid_shw.tolist() == rows.tolist()
    decoded = tokenizer.decode(encoded.codes, rows)
    assert decoded.shape == (1, 3, schedule.height, schedule.width)
    assert decoded.abs().max() <= 1
    semantic = tokenizer.decode_semantic(encoded.codes, rows)
    assert semantic.shape == (1, schedule.scale_lengths[-1], 12)


def test_every_prefix_of_scales_decodes_at_full_size(tokenizer):
    schedule = ScaleSchedule((14, 18), 10)
    codes = tokenizer.encode(pictures(schedule), torch.tensor([schedule.grid_shw])).codes
    for end in schedule.offsets[1:]:
        assert tokenizer.decode(codes[:, :end], torch.tensor([schedule.grid_shw])).shape[-2:] == (
            schedule.height,
            schedule.width,
        )
    with pytest.raises(ValueError, match="do not fill whole scales"):
        tokenizer.decode(codes[:, :-1], torch.tensor([schedule.grid_shw]))


def test_batch_equals_one_by_one_and_a_list_of_sizes(tokenizer):
    square, wide = ScaleSchedule(num_scales=5), ScaleSchedule((8, 32), 6)
    batch = pictures(square, 3)
    together = tokenizer.encode(batch)
    images = [batch[0], pictures(wide)[0], batch[1], batch[2]]
    rows = torch.tensor([s.grid_shw for s in (square, wide, square, square)])
    apart = tokenizer.encode(images, rows)
    for index, position in ((0, 0), (2, 1), (3, 2)):
        assert torch.equal(apart.codes[index], together.codes[position])
    assert apart.image_grid_shw.tolist() == rows.tolist()
    decoded = tokenizer.decode(apart.codes, apart.image_grid_shw)
    assert [tuple(image.shape[-2:]) for image in decoded] == [(80, 80), (wide.height, wide.width), (80, 80), (80, 80)]
    torch.testing.assert_close(decoded[0], tokenizer.decode(together.codes, together.image_grid_shw)[0])


def test_encoding_is_deterministic_and_decode_is_what_encode_quantized(tokenizer):
    pixel_values = pictures(ScaleSchedule(num_scales=5), 2)
    first, again = tokenizer.encode(pixel_values), tokenizer.encode(pixel_values)
    assert torch.equal(first.codes, again.codes)
    latents = tokenizer.codes_to_latents(first.codes, first.image_grid_shw)
    torch.testing.assert_close(latents, first.quantized, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        tokenizer.decode_latents(first.quantized),
        tokenizer.decode(first.codes, first.image_grid_shw),
        atol=1e-4,
        rtol=0,
    )


def test_self_correction_is_seeded_and_keeps_the_global_generator(tokenizer):
    pixel_values = pictures(ScaleSchedule(num_scales=8), 2)

    def encode(seed):
        return tokenizer.encode(pixel_values, self_correction=True, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first, again, other = encode(0), encode(0), encode(1)
    assert torch.equal(first.codes, again.codes) and not torch.equal(first.codes, other.codes)
    assert not torch.equal(first.codes, first.target_codes)
    assert torch.equal(torch.get_rng_state(), state)


def test_semantic_patches_are_what_siglip2_is_given(tokenizer):
    """The naflex image processor of transformers is the reference for the order of pixels in a patch."""
    from transformers import Siglip2ImageProcessorPil

    height, width = 48, 80
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = Siglip2ImageProcessorPil(do_resize=False, patch_size=16, max_num_patches=15)
    inputs = reference(image.numpy(), return_tensors="pt", input_data_format="channels_first")
    expected = tokenizer.semantic_encoder(**inputs, output_hidden_states=True).hidden_states[-2]
    found = tokenizer.encode_semantic(image[None].float() / 127.5 - 1)
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-4)


def test_forward_trains_every_branch():
    torch.manual_seed(0)
    model = NextFlowImageTokenizer(tiny_config(vision_feature_layer=-1)).train()
    pixel_values = pictures(ScaleSchedule(num_scales=4), 2)
    output = model(pixel_values, kept_scales=[0, 2, 3])
    assert output.codes.shape == (2, 1 + 9 + 16)
    losses = (output.pixel_values - pixel_values).square().mean() + output.semantic_features.square().mean()
    (losses + output.codebook_loss + output.commitment_loss + output.residual.square().mean()).backward()
    # The last norm and the pooling head belong to the encoder's own checkpoint; its features are read before them.
    unused = ("semantic_encoder.post_layernorm", "semantic_encoder.head")
    silent = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith(unused)]
    assert silent == []


def test_pixels_alone_choose_the_codes_without_the_semantic_branch():
    torch.manual_seed(0)
    model = NextFlowImageTokenizer(tiny_config()).eval()
    pixel_values = pictures(ScaleSchedule(num_scales=4))
    before = model(pixel_values, semantic=False).codes
    model.quantizer.semantic_codebook.weight.data.normal_()
    output = model(pixel_values, semantic=False)
    assert torch.equal(output.codes, before) and output.semantic_features is None


def test_enlarged_decoder(tmp_path, tokenizer):
    model = NextFlowImageTokenizer(tiny_config())
    small = sum(p.numel() for p in model.pixel_decoder.parameters())
    model.enlarge_pixel_decoder(deepen=2)
    assert model.config.decoder_hidden_sizes == [16, 16] and model.config.decoder_num_res_blocks == 2
    assert sum(p.numel() for p in model.pixel_decoder.parameters()) > 3 * small
    model.save_pretrained(tmp_path)
    loaded = NextFlowImageTokenizer.from_pretrained(tmp_path).eval()
    codes, rows = torch.zeros(1, 204, dtype=torch.long), torch.tensor([[8, 16, 16]])
    torch.testing.assert_close(loaded.decode(codes, rows), model.eval().decode(codes, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path, tokenizer, dtype):
    tokenizer.save_pretrained(tmp_path)
    loaded = NextFlowImageTokenizer.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype and loaded.quantizer.pixel_codebook.weight.dtype == torch.float32
    expected = tokenizer.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    encoded = loaded.encode(pictures(ScaleSchedule(num_scales=4)))
    assert loaded.decode(encoded.codes, encoded.image_grid_shw).dtype == dtype


def test_partial_and_pickled_checkpoints_are_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = "quantizer.pixel_codebook.weight"
    save_file(weights | {key: weights[key][:-5].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key} has \(27, .* instead of \(32, .*Check `codebook_size`"):
        NextFlowImageTokenizer.from_pretrained(tmp_path)
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"not a whole NextFlowImageTokenizer checkpoint. Missing weights: {key}"):
        NextFlowImageTokenizer.from_pretrained(tmp_path)
    torch.save(tokenizer.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights"):
        NextFlowImageTokenizer.from_pretrained(tmp_path)


def test_bad_images(tokenizer):
    with pytest.raises(ValueError, match=r"nearest legal sizes"):
        tokenizer.encode(torch.zeros(1, 3, 100, 100))
    with pytest.raises(ValueError, match=r"shape \(batch, 3, height, width\)"):
        tokenizer.encode(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="stands for 80 x 80 pixels, but the images have 64 x 64"):
        tokenizer.encode(torch.zeros(1, 3, 64, 64), torch.tensor([[5, 16, 16]]))
    with pytest.raises(ValueError, match="empty list"):
        tokenizer.encode([])
    for pixel_values in (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.full((1, 3, 64, 64), 255.0)):
        with pytest.raises(ValueError, match=r"must be floats in \[-1, 1\].*image processor"):
            tokenizer.encode(pixel_values)
    for images in ([torch.zeros(1, 3, 64, 64)], torch.zeros(1, 3, 64, 64).numpy(), [None]):
        with pytest.raises(ValueError, match=r"list of images must hold tensors of shape \(3, height, width\)"):
            tokenizer.encode(images)
    rows = torch.tensor([[4, 16, 16]])
    with pytest.raises(ValueError, match="Got 2 images, but `image_grid_shw` has 1 rows"):
        tokenizer.encode([torch.zeros(3, 64, 64)] * 2, rows)
    with pytest.raises(ValueError, match="2 images but 3 rows"):
        tokenizer.encode(torch.zeros(2, 3, 64, 64), rows.repeat(3, 1))
    small = NextFlowImageTokenizer(tiny_config(num_scales=4))
    with pytest.raises(ValueError, match="take 5 scales, but this tokenizer has 4"):
        small.encode(torch.zeros(1, 3, 80, 80))


def test_bad_codes(tokenizer):
    rows = torch.tensor([[2, 16, 16]])
    with pytest.raises(ValueError, match=r"Codes must lie in \[0, 32\).*another image tokenizer"):
        tokenizer.decode(torch.full((1, 5), 32), rows)
    with pytest.raises(ValueError, match="must share one grid"):
        tokenizer.decode(torch.zeros(2, 5, dtype=torch.long), torch.tensor([[2, 16, 16], [2, 8, 32]]))
    with pytest.raises(ValueError, match="codes of 2 images, but `image_grid_shw` has 1 rows"):
        tokenizer.decode([torch.zeros(5, dtype=torch.long)] * 2, rows)
    with pytest.raises(ValueError, match="2 images but 3 rows"):
        tokenizer.decode(torch.zeros(2, 5, dtype=torch.long), rows.repeat(3, 1))
    for codes in (torch.zeros(5, dtype=torch.long), torch.zeros(1, 5)):
        with pytest.raises(ValueError, match=r"Codes must be integers of shape \(batch, number of codes\)"):
            tokenizer.decode(codes, rows)


def test_one_row_serves_a_batch(tokenizer):
    rows = torch.tensor([[2, 16, 16]])
    codes = torch.arange(10).view(2, 5)
    both = tokenizer.decode(codes, rows)
    assert torch.equal(both, tokenizer.decode(codes, rows.repeat(2, 1)))
    assert torch.equal(tokenizer.encode(both, rows).codes, tokenizer.encode(both).codes)


ENCODERS = {
    "siglip_vision_model": {"image_size": 64, "patch_size": 14},
    "clip_vision_model": {"image_size": 64, "patch_size": 16},
    "siglip2_vision_model": {"num_patches": 16},
}


@pytest.mark.parametrize("layer", [-2, None])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_semantic_encoders_by_configuration(tmp_path, model_type, layer):
    """Any size, trained and loaded again; a fresh model is whole (no weight is left as memory held it)."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"semantic_config": {"model_type": model_type, **sizes, **ENCODERS[model_type]}}
    torch.manual_seed(0)
    config = tiny_config(**settings, vision_feature_layer=layer, semantic_decoder_grid_size=4)
    model = NextFlowImageTokenizer(config).train()
    schedule = ScaleSchedule((14, 18), 5)
    output = model(pictures(schedule, 2))
    (output.semantic_features.square().mean() + output.commitment_loss).backward()
    encoder = model.semantic_encoder
    if model_type != "siglip2_vision_model":
        assert encoder.embeddings.position_embedding.weight.grad.abs().sum() > 0
    assert encoder.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = NextFlowImageTokenizer.from_pretrained(tmp_path)
    assert loaded.config.vision_feature_layer == layer
    expected, found = model.eval().encode(pictures(schedule)), loaded.encode(pictures(schedule))
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.quantized, expected.quantized)


@torch.no_grad()
def test_clips_features_are_its_normalised_tokens_without_the_class_token():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = {"model_type": "clip_vision_model", **sizes, **ENCODERS["clip_vision_model"]}
    tokenizer = NextFlowImageTokenizer(tiny_config(semantic_config=encoder, vision_feature_layer=None)).eval()
    reference = CLIPVisionModel(tokenizer.config.semantic_config).eval()
    reference.load_state_dict(tokenizer.semantic_encoder.state_dict())
    pixel_values = pictures(ScaleSchedule(num_scales=4))
    expected = reference.post_layernorm(reference(pixel_values).last_hidden_state)[:, 1:]
    assert torch.equal(tokenizer.encode_semantic(pixel_values).flatten(2).transpose(1, 2), expected)


def test_positions_are_read_where_tokenflow_reads_them():
    """Bicubic by hand: a grid of G cells reads the old one of g at (cell + 0.5) * g / (G + 0.1) - 0.5."""
    side, grid = 8, (6, 12)
    table = torch.randn(1, 1 + side**2, 3, generator=torch.Generator().manual_seed(0))

    def weights(num_cells: int) -> torch.Tensor:
        """Of the old places along one axis, `(num_cells, side)`: cubic convolution with a = -0.75, edges repeated."""
        rows = torch.zeros(num_cells, side)
        for cell in range(num_cells):
            place = (cell + 0.5) * side / (num_cells + 0.1) - 0.5
            for old in range(math.floor(place) - 1, math.floor(place) + 3):
                x = abs(place - old)
                near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
                rows[cell, min(max(old, 0), side - 1)] += near if x <= 1 else far
        return rows

    places = torch.einsum("hi,ijc,wj->hwc", weights(grid[0]), table[0, 1:].view(side, side, 3), weights(grid[1]))
    resized = resize_positions(table, grid)
    torch.testing.assert_close(resized[0, 1:], places.flatten(0, 1), atol=1e-5, rtol=0)
    assert torch.equal(resized[:, 0], table[:, 0]) and resize_positions(table, (side, side)) is table


def test_an_encoder_whose_patches_are_not_the_grids_cells():
    encoder = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_attention_heads": 2, "patch_size": 14}
    model = NextFlowImageTokenizer(tiny_config(semantic_config=encoder, image_size=96, num_scales=4))
    with pytest.raises(ValueError, match="gives 36 tokens for 96 x 96 pixels, but the last grid has 4 x 4 cells"):
        model.encode(torch.zeros(1, 3, 96, 96))


def test_other_semantic_encoders_are_refused():
    settings = {"semantic_config": {"model_type": "vit"}, "semantic_decoder_hidden_size": 16}
    with pytest.raises(ValueError, match='"vit" is not supported; use one of "siglip2_vision_model", "siglip_vision'):
        NextFlowImageTokenizer(tiny_config(**settings))
