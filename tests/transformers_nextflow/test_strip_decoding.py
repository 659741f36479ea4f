"""Decoding in strips equals decoding the whole map, at every strip height, and takes less memory."""

import pytest
import torch
from torch import nn

from transformers_nextflow.configuration_nextflow import NextFlowImageTokenizerConfig
from transformers_nextflow.modeling_nextflow_image_tokenizer import NextFlowImageTokenizer
from transformers_nextflow.scale_schedule import ScaleSchedule
from transformers_nextflow.strip_decoding import decode_in_strips, norm_as_scale_and_shift, split_rows

SCHEDULE = ScaleSchedule((12, 20), 6)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = NextFlowImageTokenizerConfig(
        codebook_size=32,
        num_scales=6,
        semantic_config={"model_type": "siglip2_vision_model", "vision_use_head": False, **vision},
        semantic_decoder_num_heads=2,
        encoder_hidden_sizes=[8, 8, 8, 8, 8],
        decoder_hidden_sizes=[8, 8, 16, 16, 16],
        encoder_num_res_blocks=1,
        decoder_num_res_blocks=1,
        cnn_norm_groups=4,
    )
    tokenizer = NextFlowImageTokenizer(config).eval()
    with torch.no_grad():
        for parameter in tokenizer.pixel_decoder.parameters():  # norms that do something
            parameter.add_(0.2 * torch.randn_like(parameter))
    return tokenizer


@pytest.mark.parametrize("rows", [1, 5, 64, 1000])
def test_strips_equal_the_whole(tokenizer, rows):
    codes = torch.randint(32, (2, SCHEDULE.num_tokens), generator=torch.Generator().manual_seed(0))
    grids = torch.tensor([SCHEDULE.grid_shw])
    whole = tokenizer.decode(codes, grids)
    tokenizer.enable_tiling(rows)
    try:
        strips = tokenizer.decode(codes, grids)
    finally:
        tokenizer.disable_tiling()
    assert whole.shape == strips.shape == (2, 3, SCHEDULE.height, SCHEDULE.width)
    assert (whole - strips).abs().max() < 1e-4
    assert whole.std() > 0.05  # or the comparison says nothing
    assert torch.equal(tokenizer.decode(codes, grids), whole)


def test_strips_that_know_nothing_of_each_other_have_seams(tokenizer):
    maps = torch.randn(1, tokenizer.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = tokenizer.pixel_decoder(maps)
        apart = torch.cat([tokenizer.pixel_decoder(maps[:, :, start:stop]) for start, stop in split_rows(8, 4)], dim=2)
    assert (whole - apart).abs().max() > 0.01
    assert (whole - decode_in_strips(tokenizer.pixel_decoder, maps, 4)).abs().max() < 1e-4


def test_a_norm_is_a_scale_and_a_shift():
    torch.manual_seed(0)
    norm, maps = nn.GroupNorm(2, 6), 3 * torch.randn(2, 6, 7, 5) + 100
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    scale, shift = norm_as_scale_and_shift(norm, maps, rows=3)
    torch.testing.assert_close(maps * scale + shift, norm(maps), atol=1e-3, rtol=1e-4)


def test_training_runs_whole_maps(tokenizer):
    tokenizer.enable_tiling(4)
    latents = torch.randn(1, 40, 4, 4, requires_grad=True)
    tokenizer.decode_latents(latents).sum().backward()
    tokenizer.disable_tiling()
    assert latents.grad is not None


def test_a_strip_has_rows(tokenizer):
    with pytest.raises(ValueError, match="at least 1 row"):
        tokenizer.enable_tiling(0)
