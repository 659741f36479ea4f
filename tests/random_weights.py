"""Random models that say something."""

import torch
from transformers import PreTrainedModel


def sharpen(model: PreTrainedModel) -> None:
    """Makes what a random model says far from uniform, so that a wrong mask, slot or position shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
