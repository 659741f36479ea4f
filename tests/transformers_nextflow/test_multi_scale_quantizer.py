from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from transformers_nextflow.multi_scale_quantizer import MultiScaleQuantizer, SelfCorrection, downsample, upsample

GOLDEN = load_file(Path(__file__).parents[1] / "fixtures" / "golden" / "tokenflow_quantizer" / "quantizer.safetensors")
GRIDS = [(side, side) for side in (1, 2, 4, 6, 8)]


@pytest.fixture
def quantizer():
    module = MultiScaleQuantizer(64, semantic_dim=8, pixel_dim=4)
    module.semantic_codebook.weight.data.copy_(GOLDEN["codebook.semantic"])
    module.pixel_codebook.weight.data.copy_(GOLDEN["codebook.pixel"])
    return module.eval()


@pytest.fixture
def features():
    return torch.cat([GOLDEN["in.semantic"], GOLDEN["in.pixel"]], dim=1)


def test_golden_encode_and_decode(quantizer, features):
    result = quantizer(features, GRIDS)
    assert torch.equal(result.codes, GOLDEN["eval.indices"])
    torch.testing.assert_close(result.quantized, GOLDEN["eval.quantized"], atol=1e-5, rtol=0)
    torch.testing.assert_close(result.residual, features - result.quantized, atol=1e-5, rtol=0)
    assert result.codebook_loss is None and torch.equal(result.target_codes, result.codes)

    decoded = quantizer.decode(result.codes, GRIDS, (8, 8))
    torch.testing.assert_close(decoded, GOLDEN["decode_code.quantized"], atol=1e-5, rtol=0)
    prefix = quantizer.decode(result.codes[:, : 1 + 4 + 16], GRIDS, (8, 8))
    torch.testing.assert_close(prefix, GOLDEN["decode_code.partial3_quantized"], atol=1e-5, rtol=0)


def test_golden_training_losses_and_gradients(quantizer, features):
    quantizer.train()
    features.requires_grad_()
    result = quantizer(features, GRIDS)
    torch.testing.assert_close(result.codebook_loss, GOLDEN["train.vq_loss"])
    torch.testing.assert_close(result.commitment_loss, GOLDEN["train.commit_loss"])

    def gradient(loss, *inputs):
        return torch.cat(torch.autograd.grad(loss, inputs, retain_graph=True), dim=1)

    straight_through = gradient((result.quantized * GOLDEN["train.grad_weight"]).sum(), features)
    commitment = gradient(result.commitment_loss, features)
    codebooks = gradient(result.codebook_loss, quantizer.semantic_codebook.weight, quantizer.pixel_codebook.weight)
    for found, name in (
        (straight_through, "train.grad_straight_through.{}"),
        (commitment, "train.grad_commit.{}"),
        (codebooks, "train.grad_vq.codebook_{}"),
    ):
        expected = torch.cat([GOLDEN[name.format("semantic")], GOLDEN[name.format("pixel")]], dim=1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dropped", [1, 2, 3, 4])
def test_golden_scale_drop(quantizer, features, dropped):
    quantizer.train()
    result = quantizer(features, [grid for index, grid in enumerate(GRIDS) if index != dropped])
    assert torch.equal(result.codes, GOLDEN[f"train.drop{dropped}.indices"])
    torch.testing.assert_close(result.quantized, GOLDEN[f"train.drop{dropped}.quantized"], atol=1e-5, rtol=0)


def test_golden_distances(quantizer, features):
    pooled = GOLDEN["eval.scale2.pooled"]
    rows = quantizer.normalize(pooled, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    distances = quantizer.distances(rows, quantizer.codebook())
    torch.testing.assert_close(distances, GOLDEN["eval.scale2.distance"], atol=1e-5, rtol=0)


def test_semantic_distance_weight_scales_its_half_alone(quantizer, features):
    rows = quantizer.normalize(features, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    codebook = quantizer.codebook()
    quantizer.semantic_distance_weight = 0.25
    semantic = (rows[:, None, :8] - codebook[None, :, :8]).square().sum(-1)
    pixel = (rows[:, None, 8:] - codebook[None, :, 8:]).square().sum(-1)
    torch.testing.assert_close(quantizer.distances(rows, codebook), 0.25 * semantic + pixel, atol=1e-5, rtol=0)


def test_look_up_in_slices_is_the_look_up_at_once(quantizer, features, monkeypatch):
    whole = quantizer(features, GRIDS).codes
    monkeypatch.setattr("transformers_nextflow.multi_scale_quantizer._MAX_DISTANCES", 64 * 7)
    assert torch.equal(quantizer(features, GRIDS).codes, whole)


def test_self_correction(quantizer, features):
    def encode(seed, **settings):
        correction = SelfCorrection(**{"top_k": 4, "token_fraction": 0.6, "temperature": 1.0, **settings})
        return quantizer(features, GRIDS, correction, torch.Generator().manual_seed(seed))

    first, again, other = encode(0), encode(0), encode(1)
    assert torch.equal(first.codes, again.codes) and not torch.equal(first.codes, other.codes)
    # A target is the nearest code to the residual that the codes taken before it leave; redo it from the codes taken.
    residual, start = features, 0
    for h, w in GRIDS:
        rows = quantizer.normalize(downsample(residual, (h, w)), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        order = quantizer.distances(rows, quantizer.codebook()).argsort(-1).reshape(2, h * w, -1)
        taken, targets = first.codes[:, start : start + h * w], first.target_codes[:, start : start + h * w]
        assert torch.equal(order[..., 0], targets)
        assert (order[..., :4] == taken[..., None]).any(-1).all()
        vectors = quantizer.codebook()[taken].reshape(2, h, w, -1).permute(0, 3, 1, 2)
        residual = residual - upsample(vectors, (8, 8))
        start += h * w
    share = (first.codes != first.target_codes).float().mean()
    assert 0.2 < share < 0.6  # 60 % are drawn, and some of those draws are the nearest code
    assert torch.equal(encode(0, token_fraction=0.0).codes, quantizer(features, GRIDS).codes)


def test_codebooks_stay_in_fp32(quantizer, features):
    before = quantizer.semantic_codebook.weight.clone()
    quantizer.to(torch.bfloat16)
    assert torch.equal(quantizer.semantic_codebook.weight, before)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(features, GRIDS)
    assert result.quantized.dtype == torch.float32 and torch.equal(result.codes, GOLDEN["eval.indices"])


@pytest.mark.parametrize("num_codes", [2, 3, 122])
def test_codes_must_fill_whole_scales(quantizer, num_codes):
    with pytest.raises(ValueError, match=r"do not fill whole scales.*\[1, 5, 21, 57, 121\]"):
        quantizer.decode(torch.zeros(1, num_codes, dtype=torch.long), GRIDS, (8, 8))
