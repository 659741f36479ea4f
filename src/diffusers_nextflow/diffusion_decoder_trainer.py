"""Training of the diffusion decoder (arXiv 2601.02204, section 3.3) by the plain diffusion loss."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import PeftConfig
from torchvision.utils import save_image
from transformers import Trainer

from transformers_nextflow import NextFlowImageTokenizer
from transformers_nextflow.trainer.checkpoints import NextFlowTrainerMixin, check_start, copy_settings

from .diffusion_backbones import UNETS, condition_parameters, encode_with_vae
from .diffusion_decoder_config import NextFlowDiffusionDecoderTrainingConfig
from .modeling_diffusion_decoder import NextFlowDiffusionDecoder, check_parts, condition_of, prediction_type_of
from .pipeline_nextflow_decode import NextFlowDecodePipeline

STATE_FILE = "diffusion_decoder_trainer.pt"


def diffuse(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, min_snr_gamma: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy samples, and what is to be predicted of them.

    Args:
        scheduler: One of diffusers', whose noise and prediction type are taken.
        clean, noise (`torch.Tensor` of shape `(B, C, H', W')`): Samples, and standard normal noise.
        times (`torch.Tensor` of shape `(B,)`): In [0, 1); 0 is hardly any noise.
        min_snr_gamma (`float`, *optional*): Bound of the signal-to-noise ratio in the weights.

    Returns:
        Noisy samples, timesteps `(B,)` on the scheduler's scale, targets, and weights `(B,)` of the squared errors.
    """
    num_steps, kind = scheduler.config.num_train_timesteps, prediction_type_of(scheduler)
    if kind == "flow_prediction":
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        sigmas = shift * times / (1 + (shift - 1) * times)
        sigma = sigmas[:, None, None, None]
        return (1 - sigma) * clean + sigma * noise, sigmas * num_steps, noise - clean, torch.ones_like(times)
    timesteps = (times * num_steps).long()
    signal = scheduler.alphas_cumprod.to(clean.device)[timesteps]
    keep, spoil = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
    target = {"epsilon": noise, "v_prediction": keep * noise - spoil * clean, "sample": clean}[kind]
    weights = torch.ones_like(times)
    if min_snr_gamma is not None:
        snr = signal / (1 - signal)
        bounded = snr.clamp(max=min_snr_gamma)
        weights = {"epsilon": bounded / snr, "v_prediction": bounded / (snr + 1), "sample": bounded}[kind]
    return keep * clean + spoil * noise, timesteps, target, weights


class NextFlowDiffusionDecoderTrainer(NextFlowTrainerMixin, Trainer):
    """
    transformers' [`~transformers.Trainer`] for [`NextFlowDiffusionDecoder`]: the whole decoder, or LoRA and what the
    condition goes through. What it saves loads with [`NextFlowDecodePipeline`]; checkpoints of LoRA hold the adapter
    alone, and `save_model` merges it.

    Args:
        model ([`NextFlowDiffusionDecoder`]): The decoder, in float32.
        args ([`NextFlowDiffusionDecoderTrainingConfig`], *optional*): Settings.
        image_tokenizer ([`~transformers_nextflow.NextFlowImageTokenizer`]): Whose codes they are; it stays as it is.
        scheduler: One of diffusers' schedulers, of the decoder's `prediction_type`.
        vae (*optional*): The autoencoder of a decoder that draws latents; it stays as it is.
        peft_config (`LoraConfig`, *optional*): For a transformer: which of its matrices get adapters.
        kwargs: Everything else that `Trainer` takes. A sample of `train_dataset` is a dict with `codes` `(n,)` of whole
            scales, `image_grid_shw` `(3,)` and `pixel_values` `(3, H, W)` in [-1, 1], of the codes' size times the
            largest of `scale_factors`; with captions also `prompt_embeds` and `pooled_prompt_embeds`, as the backbone
            takes them. `image_tokenizer_hash` is checked where it is there. Images of a batch have one size.

    Raises:
        `ValueError`: if the parts, the settings or the data don't fit together, or a loss is not finite.

    Example:

    ```python
    >>> from diffusers_nextflow import NextFlowDiffusionDecoderTrainer, NextFlowDiffusionDecoderTrainingConfig

    >>> settings = NextFlowDiffusionDecoderTrainingConfig("runs/diffusion_decoder", ema_decay=0.999)
    >>> trainer = NextFlowDiffusionDecoderTrainer(decoder, settings, image_tokenizer=image_tokenizer,
    ...     scheduler=scheduler, train_dataset=dataset)
    >>> trainer.train()
    ```
    """

    args: NextFlowDiffusionDecoderTrainingConfig

    def __init__(
        self,
        model: NextFlowDiffusionDecoder,
        args: NextFlowDiffusionDecoderTrainingConfig | None = None,
        *,
        image_tokenizer: NextFlowImageTokenizer,
        scheduler: Any,
        vae: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        args = copy_settings(args, NextFlowDiffusionDecoderTrainingConfig, "nextflow-diffusion-decoder")
        check_parts(model, scheduler, image_tokenizer, vae)
        if args.min_snr_gamma is not None and model.config.prediction_type == "flow_prediction":
            raise ValueError("`min_snr_gamma` is not for flow matching: leave it out, or use `timestep_sampling`.")
        model.set_scale_factors(args.scale_factors)
        for dataset in (kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            _check_hashes(dataset, model.config.image_tokenizer_hash)
        if peft_config is not None:
            if isinstance(model.backbone, UNETS):
                raise ValueError(
                    f"A {type(model.backbone).__name__} is trained whole, as in the paper: its input convolution has "
                    "to learn the condition. Leave out `peft_config`, which is for transformers."
                )
            model.requires_grad_(False)
            model.backbone.add_adapter(peft_config)
            for parameter in (*model.condition_proj.parameters(), *condition_parameters(model.backbone)):
                parameter.requires_grad_(True)
        if args.activation_checkpointing:  # diffusers' models are told by another name
            model.enable_gradient_checkpointing()
            args.activation_checkpointing = False
        check_start(model, None, peft_config)
        self.has_lora = peft_config is not None
        super().__init__(model, args, **kwargs)
        self.image_tokenizer = image_tokenizer.requires_grad_(False).eval().to(args.device)
        self.vae: Any = None if vae is None else vae.requires_grad_(False).eval().to(args.device)
        self.diffusion_scheduler = scheduler  # `scheduler` is one of learning rates to transformers

    # The loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean squared error of what the decoder predicts, at timesteps and with noise from the global state."""
        args, decoder = self.args, self.accelerator.unwrap_model(model)
        factors = list(decoder.config.scale_factors)
        factor = factors[int(torch.randint(len(factors), ()))]
        with torch.no_grad():
            condition, clean = self._read(decoder, inputs, factor)
            noise = torch.randn_like(clean)
            times = compute_density_for_timestep_sampling(args.timestep_sampling, len(clean), 0.0, 1.0)
            noisy, timesteps, target, weights = diffuse(
                self.diffusion_scheduler, clean, noise, times.to(clean).clamp(max=1 - 1e-6), args.min_snr_gamma
            )
            keep = torch.rand(len(clean)) >= (args.condition_dropout if model.training else 0)
        text = {name: inputs.get(name) for name in ("prompt_embeds", "pooled_prompt_embeds")}
        # Always by the wrapped model's forward: only so gradients are averaged over ranks.
        predicted = model(noisy, timesteps, condition, keep.to(clean.device), **text, return_dict=False)[0].float()
        errors = (predicted - target).square().mean(dim=(1, 2, 3))
        loss = (weights * errors).mean()
        if model.training and not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {float(loss.detach())} at step {self.state.global_step}, for pixels from "
                f"{float(inputs['pixel_values'].min()):.3g} to {float(inputs['pixel_values'].max()):.3g} (they should "
                "be in [-1, 1]). Look at the pictures, or lower the learning rate; the last checkpoint is from before."
            )
        entry = torch.stack([errors.detach().sum(), errors.new_tensor(float(len(errors)))])
        self._count(model.training, f"error_at_{factor}x", entry)
        return (loss, {"loss": loss, "sample": predicted}) if return_outputs else loss

    def _read(self, decoder: Any, inputs: Any, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The condition `(B, K, h, w)` and the clean samples `(B, C, H', W')` of a batch."""
        latents = self.image_tokenizer.codes_to_latents(inputs["codes"], inputs["image_grid_shw"])
        grid, pixels = latents.shape[-2:], inputs["pixel_values"].float()
        largest = max(decoder.config.scale_factors)
        decoder.sample_size(grid, factor)
        expected = tuple(16 * cells * largest for cells in grid)
        if tuple(pixels.shape[-2:]) != expected:
            raise ValueError(
                f"The codes stand for {16 * grid[0]} x {16 * grid[1]} pixels, so with `scale_factors` "
                f"{list(decoder.config.scale_factors)} `pixel_values` must be {expected[0]} x {expected[1]}, but they "
                f"are {pixels.shape[-2]} x {pixels.shape[-1]}."
            )
        if factor != largest:
            pixels = F.interpolate(pixels, scale_factor=factor / largest, mode="bicubic", antialias=True).clamp(-1, 1)
        clean = pixels if self.vae is None else encode_with_vae(self.vae, pixels).float()
        return condition_of(self.image_tokenizer, latents), clean

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss at timesteps and with noise that are the same in every evaluation."""
        with torch.no_grad(), torch.random.fork_rng(), self.compute_loss_context_manager():
            torch.manual_seed(self.args.seed)
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # Pictures

    def pipeline(self) -> NextFlowDecodePipeline:
        """The parts as a pipeline, which shares them."""
        decoder: Any = self.accelerator.unwrap_model(self.model)
        pipe = NextFlowDecodePipeline(decoder, self.diffusion_scheduler, self.image_tokenizer, self.vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def save_pictures(self, file: Path) -> None:
        """Writes a row for each of the first samples: original, image tokenizer's decoder, diffusion decoder."""
        data: Any = self.eval_dataset if self.eval_dataset is not None else self.train_dataset
        number = min(self.args.num_logged_images, len(data))
        decoder: Any = self.accelerator.unwrap_model(self.model)
        training, factor, rows = decoder.training, max(decoder.config.scale_factors), []
        decoder.eval()
        for index in range(number):
            inputs = self._prepare_inputs(self.data_collator([data[index]]))
            codes, grid, pixels = inputs["codes"], inputs["image_grid_shw"], inputs["pixel_values"].float()
            plain = self.image_tokenizer.decode(codes, grid).float()
            plain = F.interpolate(plain, pixels.shape[-2:], mode="bicubic").clamp(-1, 1)
            text = {name: inputs.get(name) for name in ("prompt_embeds", "pooled_prompt_embeds")}
            generator = torch.Generator().manual_seed(index)
            settings = {"scale_factor": factor, "generator": generator, "output_type": "pt", **text}
            [drawn] = self.pipeline()(codes, grid, return_dict=False, **settings)
            rows.append(torch.cat([pixels, plain, drawn.to(pixels) * 2 - 1], dim=-1)[0])
        decoder.train(training)
        file.parent.mkdir(parents=True, exist_ok=True)
        alike = [row for row in rows if row.shape == rows[0].shape]
        save_image((torch.cat(alike, dim=-2) + 1) / 2, file)

    # Saving

    def _run_facts(self) -> dict[str, Any]:
        return super()._run_facts() | {"lora": self.has_lora, "scale_factors": list(self.args.scale_factors)}

    def _save_run_state(self, folder: Path) -> None:
        with self.averaged():
            if self.args.should_save:
                torch.save({"weights": dict(self._trained())}, folder / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        state = torch.load(Path(resume_from_checkpoint, STATE_FILE), map_location=self.args.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state["weights"][name])

    def _save_checkpoint(self, model, trial):
        if self.args.should_save and self.args.num_logged_images:
            with self.averaged():
                self.save_pictures(Path(self.args.output_dir, "pictures", f"{self.state.global_step:06d}.png"))
        super()._save_checkpoint(model, trial)  # last: a run that goes on from it makes no picture of this step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves a folder for [`NextFlowDecodePipeline`], with the average of the weights, and LoRA merged."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        if _internal_call and self.has_lora:
            return  # the adapter is in the run's state
        with self.averaged():
            pipe = self.pipeline()
            if self.has_lora:
                pipe.diffusion_decoder = copy.deepcopy(pipe.diffusion_decoder)
                pipe.diffusion_decoder.backbone.fuse_lora()
                pipe.diffusion_decoder.backbone.unload_lora()
            pipe.save_pretrained(folder)
        (folder / "README.md").write_text(self._model_card(), encoding="utf-8")

    def _how_to_load(self, model: Any) -> str:
        return "NextFlowDecodePipeline.from_pretrained(folder)"


def _check_hashes(dataset: Any, ours: str | None) -> None:
    """Refuses rows whose codes say that they are of another image tokenizer."""
    if not ours or "image_tokenizer_hash" not in (getattr(dataset, "column_names", None) or ()):
        return
    if theirs := sorted({value for value in dataset["image_tokenizer_hash"] if value} - {ours}):
        raise ValueError(
            f"The codes come from the image tokenizer {', '.join(theirs)}, but the diffusion decoder is for {ours}: "
            "the same number means another picture. Extract all codes with the decoder's own image tokenizer."
        )
