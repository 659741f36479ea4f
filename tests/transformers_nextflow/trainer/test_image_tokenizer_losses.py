"""The optional terms of the image tokenizer's training."""

import pytest
import torch

from transformers_nextflow.trainer import FeatureLoss, PatchDiscriminator


def test_the_feature_loss_is_what_its_formula_says():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.rand(2, 3, 8, 8, generator=generator, requires_grad=grad) for grad in (True, False))
    loss = FeatureLoss(lambda images: [images, images[..., ::2, ::2]])(ours, theirs)
    distances = [
        ((a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)) ** 2).sum(1).mean()
        for a, b in ((ours, theirs), (ours[..., ::2, ::2], theirs[..., ::2, ::2]))
    ]
    torch.testing.assert_close(loss, sum(distances) / 2)
    loss.backward()
    assert ours.grad.abs().sum() > 0 and FeatureLoss(lambda images: [images])(theirs, theirs) == 0


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_score_of_the_critic_judges_a_patch(num_layers):
    torch.manual_seed(0)
    critic = PatchDiscriminator(8, num_layers).requires_grad_(False)
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    scores = critic(image)
    assert scores.shape == (1, 1, 64 // 2**num_layers, 64 // 2**num_layers)
    if num_layers == 1:  # no norm, so what a score depends on is its patch alone
        scores[0, 0, 0, 0].backward()
        assert image.grad[..., :7, :7].abs().sum() > 0 and image.grad[..., 7:, 7:].abs().sum() == 0
