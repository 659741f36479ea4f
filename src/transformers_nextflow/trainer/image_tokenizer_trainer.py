"""Training of the image tokenizer in the paper's three stages (arXiv 2601.02204, section 3)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import nn
from torchvision.utils import save_image
from transformers import Trainer, TrainerCallback, default_data_collator

from ..modeling_nextflow_image_tokenizer import NextFlowImageTokenizer
from .checkpoints import NextFlowTrainerMixin, check_start, copy_settings
from .image_tokenizer_config import NextFlowImageTokenizerTrainingConfig

STATE_FILE = "image_tokenizer_trainer.pt"
USAGE_DECAY = 0.97  # a step; a code is dead when its running count falls below one half


def draw_kept_scales(num_scales: int, dropout: float, generator: torch.Generator | None = None) -> list[int]:
    """Scales to quantize on: the first, the last, and each other one with probability `1 - dropout`."""
    kept = torch.rand(num_scales, generator=generator) >= dropout
    kept[[0, -1]] = True
    return kept.nonzero()[:, 0].tolist()


@torch.no_grad()
def revive_dead_codes(
    model: NextFlowImageTokenizer, counts: torch.Tensor, generator: torch.Generator | None = None
) -> int:
    """Moves codes that were not used lately next to codes that are used much.

    Args:
        model ([`NextFlowImageTokenizer`]): Its codebooks are changed in place.
        counts (`torch.FloatTensor` of shape `(K,)`): How often each code was used lately.
        generator (`torch.Generator`, *optional*): Source of the draws.

    Returns:
        `int`: how many codes moved.
    """
    dead = (counts == 0).nonzero()[:, 0]
    if len(dead) == 0 or counts.sum() == 0:
        return 0
    source = torch.multinomial(counts.float().sqrt(), len(dead), replacement=True, generator=generator)
    for table in (model.quantizer.semantic_codebook, model.quantizer.pixel_codebook):
        rows = F.normalize(table.weight[source], dim=-1)
        noise = torch.randn(rows.shape, generator=generator, device=counts.device).to(rows)
        table.weight[dead] = rows + 0.15 * noise / rows.shape[-1] ** 0.5
    return len(dead)


def trainable_parameters(model: NextFlowImageTokenizer, stage: str) -> list[nn.Parameter]:
    """Freezes what a stage does not train, and returns the rest."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name.startswith(("pixel_decoder", "post_pixel_proj"))
            if stage == "decoder"
            else stage == "joint" or not name.startswith("semantic_")
        )
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def psnr(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image `(B, 3, H, W)` in [-1, 1]: `(B,)`."""
    error = (prediction.float().clamp(-1, 1) - target).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def collate_pixels(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Samples with `pixel_values` `(3, H, W)` as a batch `(B, 3, H, W)`."""
    if any("pixel_values" not in sample for sample in samples):
        raise ValueError(
            f"A sample needs `pixel_values` (3, height, width), which `NextFlowImageProcessor` makes, but this one has "
            f"{', '.join(samples[0])}."
        )
    if len(shapes := {np.shape(sample["pixel_values"]) for sample in samples}) > 1:
        raise ValueError(
            f"Images of one batch must have one size, but these have {', '.join(map(str, map(tuple, shapes)))}. Give "
            "the image processor `height` and `width`, or draw batches of one size."
        )
    return default_data_collator(samples)


class NextFlowImageTokenizerTrainer(NextFlowTrainerMixin, Trainer):
    """
    transformers' [`~transformers.Trainer`] for [`NextFlowImageTokenizer`]: scale dropout, revival of dead codes,
    semantic distillation, and optional perceptual and adversarial terms. PSNR, the share of codes in use and every term
    of the loss are logged.

    Args:
        model ([`NextFlowImageTokenizer`]): Weights that the stage does not train are frozen here.
        args ([`NextFlowImageTokenizerTrainingConfig`], *optional*): Settings.
        teacher (callable, *optional*):
            From images `(B, 3, H, W)` in [-1, 1] to features `(B, C, h, w)` on the last scale's grid, C being
            `config.semantic_feature_dim`: any frozen encoder. Needed for the stage `"joint"`.
        perceptual_loss (callable, *optional*):
            From two batches of images to a loss, a scalar: [`FeatureLoss`] over any network, LPIPS, ...
        discriminator (`nn.Module`, *optional*):
            [`PatchDiscriminator`] or another, from images to scores of any shape, high for real ones. It is trained
            beside the tokenizer with the hinge loss, by an optimizer of its own at the run's learning rate.
        kwargs: Everything else that `Trainer` takes. A sample of `train_dataset` is a dict with `pixel_values`
            `(3, H, W)` in [-1, 1]; images of a batch have one size.

    Raises:
        `ValueError`: while training, if a loss is not finite, with its terms.

    Example:

    ```python
    >>> from transformers_nextflow.trainer import NextFlowImageTokenizerTrainer, NextFlowImageTokenizerTrainingConfig

    >>> settings = NextFlowImageTokenizerTrainingConfig("runs/tokenizer", stage="pixel")
    >>> trainer = NextFlowImageTokenizerTrainer(image_tokenizer, settings, train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    args: NextFlowImageTokenizerTrainingConfig

    def __init__(
        self,
        model: NextFlowImageTokenizer,
        args: NextFlowImageTokenizerTrainingConfig | None = None,
        *,
        teacher: Callable[[torch.Tensor], torch.Tensor] | None = None,
        perceptual_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        discriminator: nn.Module | None = None,
        **kwargs,
    ):
        args = copy_settings(args, NextFlowImageTokenizerTrainingConfig, "nextflow-image-tokenizer")
        if args.stage == "joint" and teacher is None:
            raise ValueError(
                'The stage "joint" needs a `teacher`, whose features the semantic codes learn. Pass one, or train the '
                'stage "pixel".'
            )
        trainable_parameters(model, args.stage)
        check_start(model)
        super().__init__(model, args, **{"data_collator": collate_pixels, **kwargs})
        self.teacher, self.perceptual_loss = teacher, perceptual_loss
        self.discriminator: Any = discriminator
        if discriminator is not None:
            discriminator.to(args.device)
            broadcast(list(discriminator.state_dict().values()))  # its gradients are averaged below
            options: dict[str, Any] = {"lr": args.learning_rate, "betas": (0.5, 0.9)}
            self._discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), **options)
        self._counts = torch.zeros(model.config.codebook_size, device=args.device)
        self._shown: tuple[torch.Tensor, torch.Tensor] | None = None
        self.callback_handler.callbacks.insert(0, _Codebook(self))  # before the average of the weights moves

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Reconstruction and, by stage, quantization, distillation and the optional terms."""
        args, pixels = self.args, inputs["pixel_values"]
        tokenizer: Any = self.accelerator.unwrap_model(model)
        # Always by the wrapped model's forward: only so gradients are averaged over ranks.
        if args.stage == "decoder":
            output = model(pixels, decoder_only=True)
        else:
            num_scales = tokenizer._check_images(pixels, None).num_scales
            kept = draw_kept_scales(num_scales, args.scale_dropout if model.training else 0)
            output = model(pixels, kept_scales=kept, semantic=args.stage == "joint")
        prediction, codes = output.pixel_values.float(), output.codes
        parts = {
            "reconstruction": args.l1_weight * F.l1_loss(prediction, pixels)
            + args.l2_weight * F.mse_loss(prediction, pixels)
        }
        if args.stage != "decoder":
            if model.training:
                parts["codebook"] = output.codebook_loss + output.commitment_loss
            parts["residual"] = args.residual_weight * output.residual.square().mean()
        if self.teacher is not None and args.stage == "joint":
            parts["semantic"] = args.semantic_weight * self._distance_to_teacher(pixels, output.semantic_features)
        if self.perceptual_loss is not None:
            parts["perceptual"] = args.perceptual_weight * self.perceptual_loss(prediction, pixels)
        if self.discriminator is not None and model.training and self.state.global_step >= args.adversarial_start_steps:
            parts["discriminator"] = self._train_discriminator(pixels, prediction.detach())
            self.discriminator.requires_grad_(False)  # its own loss is the one above
            parts["adversarial"] = args.adversarial_weight * -self.discriminator(prediction).mean()
            self.discriminator.requires_grad_(True)
        loss: Any = sum(value for name, value in parts.items() if name != "discriminator")
        if model.training:
            if not torch.isfinite(loss):
                terms = ", ".join(f"{name} {float(value):.4g}" for name, value in parts.items())
                raise ValueError(
                    f"The loss is {float(loss)} at step {self.state.global_step}: {terms}. Pixels reach from "
                    f"{float(pixels.min()):.3g} to {float(pixels.max()):.3g} and should be in [-1, 1]. Look at the "
                    "pictures, or lower the learning rate; the last checkpoint is from before."
                )
            used = torch.bincount(codes.flatten(), minlength=len(self._counts))
            self._counts = USAGE_DECAY * self._counts + self.accelerator.reduce(used, "sum")  # the same on every rank
            self._counts[self._counts < 0.5] = 0
            parts["codes_in_use"] = (self._counts > 0).float().mean()
            self._shown = (pixels.detach(), prediction.detach())
        parts["psnr"] = psnr(prediction.detach(), pixels).mean()
        for name, value in parts.items():
            self._count(
                model.training, name, torch.tensor([float(value.detach()), 1.0], device=args.device) * len(pixels)
            )
        outputs = {"loss": loss, "pixel_values": prediction, "codes": codes}
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss, which the stock trainer does not find, for there are no labels."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _distance_to_teacher(self, pixels: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        number = self.args.teacher_batch_size or len(pixels)
        with torch.no_grad():
            features = self.teacher(pixels[:number])  # type: ignore[misc]  # checked at the start
        target, predicted = features.flatten(2).transpose(1, 2), predicted[:number].float()
        if target.shape != predicted.shape:
            raise ValueError(
                f"The teacher's features are {tuple(features.shape)}, but the tokenizer predicts {predicted.shape[-1]} "
                f"channels on {predicted.shape[1]} cells. Resize the images that the teacher sees, or its features."
            )
        return 1 - F.cosine_similarity(predicted, target.to(predicted), dim=-1).mean()

    def _train_discriminator(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        loss = F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean()
        loss.backward()
        for parameter in self.discriminator.parameters():  # it is not wrapped in DDP: ranks would drift apart
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        self._discriminator_optimizer.step()
        self._discriminator_optimizer.zero_grad()
        return loss

    def _run_facts(self) -> dict[str, Any]:
        return super()._run_facts() | {"discriminator": self.discriminator is not None}

    def _save_run_state(self, folder: Path) -> None:
        state: dict[str, Any] = {"counts": self._counts}
        if self.discriminator is not None:
            optimizer = self._discriminator_optimizer.state_dict()
            state |= {"discriminator": self.discriminator.state_dict(), "discriminator_optimizer": optimizer}
        if self.args.should_save:
            torch.save(state, folder / STATE_FILE)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save and self._shown is not None and self.args.num_logged_images:
            folder = Path(self.args.output_dir, "reconstructions")
            folder.mkdir(parents=True, exist_ok=True)
            pictures = torch.cat([batch[: self.args.num_logged_images] for batch in self._shown]).float().clamp(-1, 1)
            file = folder / f"{self.state.global_step:06d}.png"
            save_image((pictures + 1) / 2, file, nrow=len(pictures) // 2, padding=0)
        super()._save_checkpoint(model, trial)  # last: a run that goes on from it makes no picture of this step

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Weights, what was counted, and the discriminator: without the counts live codes would be taken for dead."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = torch.load(Path(resume_from_checkpoint, STATE_FILE), map_location=self.args.device, weights_only=True)
        self._counts = state["counts"]
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self._discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])


class _Codebook(TrainerCallback):
    """Revives dead codes between steps, the same ones on every rank."""

    def __init__(self, trainer: NextFlowImageTokenizerTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        due = state.global_step % args.revive_steps == 0 and state.global_step < args.revive_until * state.max_steps
        if args.stage == "decoder" or not due:
            return
        generator = torch.Generator(trainer._counts.device).manual_seed(args.seed + state.global_step)
        moved = revive_dead_codes(trainer.accelerator.unwrap_model(trainer.model), trainer._counts, generator)
        trainer._count(True, "revived", torch.tensor([moved, 1.0], device=args.device))
