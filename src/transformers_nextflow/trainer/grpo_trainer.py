"""GRPO with prefix-tuning on TRL."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets.fingerprint import Hasher
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import use_adapter

from ..generation_config_nextflow import SIZE, NextFlowGenerationConfig, prompt_task, trained_style
from ..processing_nextflow import NextFlowProcessor
from ..token_layout import scale_weights, split_grids
from .checkpoints import NextFlowTrainerMixin, copy_settings, load_model
from .grpo_config import NextFlowGRPOConfig
from .grpo_losses import (
    code_log_probs,
    group_advantages,
    middle_returns,
    policy_loss,
    propagate_mask,
    thought_log_probs,
)
from .reward_call import make_reward_call

STATE_FILE = "grpo_state_{}.pt"  # one per process

Row = dict[str, Any]
_GRPOTrainer: Any = GRPOTrainer  # its attributes are declared as unions of what other trainers have, too


class Stage(NamedTuple):
    """What one update trains: `scales`, on samples of which each has `num_images` pictures.

    `prefix_scales` are shared by `images_per_prefix` pictures in a row (0 and 1 without VMR).
    """

    scales: range
    prefix_scales: int = 0
    images_per_prefix: int = 1
    num_images: int = 1


class Rollout(NamedTuple):
    """The pictures of a batch of R rows, `num_images` per row.

    Args:
        prompt_ids, prompt_mask (`torch.LongTensor` of shape `(R, L)`): Left-padded, ending with `<boi>`.
        grids (`list[torch.LongTensor]`): For each row the grids of the images in its prompt and of the drawn one.
        codes (`torch.LongTensor` of shape `(R * num_images, N)`): In `[0, K)`.
        thoughts (`list[list[int]]`, *optional*): What each row thought, with `thinking`; part of `prompt_ids`, too.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    grids: list[torch.Tensor]
    codes: torch.Tensor
    thoughts: list[list[int]] | None = None


class NextFlowGRPOTrainer(NextFlowTrainerMixin, _GRPOTrainer):
    """
    TRL's [`~trl.GRPOTrainer`] for pictures: groups of pictures are drawn for a prompt, rewarded, and the codes of their
    first scales are made likelier or less likely (prefix-tuning, arXiv 2601.02204; VMR and mask propagation, arXiv
    2601.02256).

    A row of the data set has a `prompt`, text or a conversation. Pictures in it (for editing) stand in the column
    `images` (one for each `<image>` mark) or in the messages. Reward functions get `images`, the drawn pictures;
    `prompts`; the prompts' own pictures as `source_images`; with `thinking` the texts before the pictures as
    `thoughts`; and all other columns, as far as they name them. They return one number per picture (None where they
    can't tell), or a [`RewardOutput`], which adds masks of the pixels that decide.

    Args:
        model ([`NextFlowForCausalLM`], `PeftModel` or `str`): The model, or its folder.
        reward_funcs (a function or a list of them): What pictures are worth; summed with `args.reward_weights`.
        args ([`NextFlowGRPOConfig`], *optional*): Settings.
        processing_class ([`NextFlowProcessor`], *optional*): With its image tokenizer; by default the model's.
        kwargs: Everything else that `GRPOTrainer` takes: `train_dataset`, `eval_dataset`, `peft_config`, ...

    Example:

    ```python
    >>> from transformers_nextflow.trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer

    >>> def redness(images, **kwargs):
    ...     return [np.asarray(image)[..., 0].mean() / 255 for image in images]

    >>> settings = NextFlowGRPOConfig("runs/grpo", num_trained_scales=4)
    >>> trainer = NextFlowGRPOTrainer(model, redness, settings, train_dataset=dataset, processing_class=processor)
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Callable | list[Callable],
        args: NextFlowGRPOConfig | None = None,
        *,
        processing_class: NextFlowProcessor | None = None,
        peft_config: Any = None,
        **kwargs,
    ):
        args = copy_settings(args, NextFlowGRPOConfig, "nextflow-grpo")
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` is for text; NextFlowGRPOTrainer draws pictures itself.")
        model, processor = load_model(model, args, processing_class, peft_config)
        if args.thinking and not model.config.writes_text:
            raise ValueError("`thinking` is for models that write, but this one only draws: leave it out.")
        if processing_class not in (None, processor) or processor is None or processor.image_tokenizer is None:
            raise ValueError(
                "Rewards judge pictures: pass `processing_class=NextFlowProcessor.from_pretrained(...)` with an image "
                "tokenizer."
            )
        functions = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not functions:
            raise ValueError("`reward_funcs` is empty: pass at least one reward function.")
        for rows in (kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            if isinstance(names := getattr(rows, "column_names", None), list) and "prompt" not in names:
                raise ValueError(
                    f"The rows have the columns {', '.join(names)}, but no `prompt`, a text or a conversation to draw "
                    'from: `dataset.rename_column("...", "prompt")`.'
                )
        size, _ = NextFlowGenerationConfig.merge({name: getattr(args, name) for name in SIZE}, None)
        self._first_visual_id = model.config.text_vocab_size
        size = size.over(model.generation_config)
        self.schedule = model.config.schedule(*(getattr(size, name) for name in SIZE))
        self._check_scales(args)
        super().__init__(
            model,
            [make_reward_call(function, args.reward_timeout) for function in functions],
            args,
            processing_class=processor,
            peft_config=peft_config,
            **kwargs,
        )
        self.processor: Any = processor
        self._card_facts = (f"Rewards: {', '.join(self.reward_func_names)}",)
        self.processor.image_tokenizer.to(self.accelerator.device).eval()
        drawn = args.per_device_train_batch_size * (args.steps_per_generation or 1)
        if args.middle_return_scale and drawn % self.num_generations:
            raise ValueError(
                "With `middle_return_scale` the pictures of a group share a prefix, so a process must draw whole "
                "groups: `per_device_train_batch_size * steps_per_generation` must be a multiple of "
                f"{self.num_generations} (`num_generations`), but is {drawn}."
            )
        # Of training and of evaluation: the update, and how many batches were drawn for it.
        self._rollouts_at = {True: (-1, 0), False: (-1, 0)}
        self.add_callback(_StepTimes(self))

    def _check_scales(self, args: NextFlowGRPOConfig):
        """Fills in `num_trained_scales`, and refuses scales that the images don't have."""
        num_scales, middle = self.schedule.num_scales, args.middle_return_scale
        trained = args.num_trained_scales = args.num_trained_scales or num_scales
        if trained > num_scales:
            raise ValueError(
                f"`num_trained_scales` is {trained}, but the images have {num_scales} scales. Choose 1 to "
                f"{num_scales}, or None for all."
            )
        if middle is not None and middle > min(trained, num_scales - 1):
            raise ValueError(
                f"`middle_return_scale` is {middle}, but it must be at most `num_trained_scales` ({trained}) and leave "
                f"scales to draw after it: choose 1 to {min(trained, num_scales - 1)}."
            )

    def _stage(self) -> Stage:
        """What the current update trains. It follows from the number of updates, so resuming goes on with it."""
        args, trained, middle = self.args, self.args.num_trained_scales, self.args.middle_return_scale
        if middle is None or not self.model.training:
            return Stage(range(trained))
        updates_per_batch = args.steps_per_generation * self.num_iterations // args.gradient_accumulation_steps
        index = self.state.global_step // max(1, updates_per_batch)
        if middle < trained and index % (args.prefix_updates_per_suffix + 1) == args.prefix_updates_per_suffix:
            return Stage(range(middle, trained), middle, self.num_generations)
        return Stage(range(middle), middle, args.num_middle_rollouts, args.num_middle_rollouts)

    # Order and checkpoints

    def _get_train_sampler(self, dataset=None):
        """TRL's, in an order that follows from seed and epoch alone."""
        sampler = _GRPOTrainer._get_train_sampler(self, dataset)
        if sampler.shuffle:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + 1_000_003 * epoch)
            self._epoch_sampler = sampler
        return sampler

    def _save_run_state(self, folder: Path) -> None:
        """The pictures that later steps will learn from: they were drawn by weights that are no more."""
        pending = self._step % (self.args.steps_per_generation * self.num_iterations)
        state = {"step": self._step, "buffer": self._buffered_inputs if pending else None}
        torch.save(state, folder / STATE_FILE.format(self.accelerator.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, STATE_FILE.format(self.accelerator.process_index))
        state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
        self._step, self._buffered_inputs = state["step"], state["buffer"]

    # Drawing

    def _read_prompts(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Token-view ids, left-padded and ending with `<boi>` (unless a thought follows), of one row per prompt."""
        texts, pictures = zip(*map(self._read_prompt, rows), strict=True)
        options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        batch = self.processor(list(texts), list(pictures) if any(pictures) else None, **options)
        ids = [] if self.args.thinking else self.processor.image_start_ids
        start = torch.tensor(ids, dtype=torch.long).expand(len(texts), -1)
        batch["input_ids"] = torch.cat([batch["input_ids"].long(), start], dim=1)
        batch["attention_mask"] = F.pad(batch["attention_mask"].long(), (0, start.shape[1]), value=1)
        return batch

    def _read_prompt(self, row: Row) -> tuple[str, list[Any]]:
        """Text with `<image>` marks and pictures of a row: `prompt` (text or messages) and `images` (or `image`).

        A text becomes a chat turn where the model was trained on such for drawing (or, with pictures, for editing), and
        for thinking unless it was trained on bare ones.
        """
        processor, prompt, images, image = self.processor, row["prompt"], row.get("images"), row.get("image")
        pictures = list(images) if images is not None and len(images) else [] if image is None else [image]
        if isinstance(prompt, str):
            processor.check_plain([prompt.replace(processor.image_token, "")])
        styles = getattr(self.accelerator.unwrap_model(self.model).generation_config, "prompt_styles", None)
        task = prompt_task(self.args.thinking, with_pictures=bool(pictures))
        if isinstance(prompt, str) and trained_style(styles, task) == "chat":
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            remaining = iter(pictures)
            parts = [part for message in prompt for part in message["content"] if isinstance(part, dict)]
            pictures = [
                part["image"] if part.get("image") is not None else next(remaining, None)
                for part in parts
                if part.get("type") == "image"
            ] + list(remaining)
            prompt = processor.apply_chat_template(prompt, add_generation_prompt=True)
        marks, number = prompt.count(processor.image_token), sum(picture is not None for picture in pictures)
        if not marks == number == len(pictures):
            raise ValueError(
                f"The prompt {prompt!r} has {marks} `{processor.image_token}` marks, but its row has {number} "
                "pictures. Put one picture per mark into the column `images`."
            )
        return prompt, pictures

    def _seeds(self, num_images: int) -> list[int]:
        """One per picture, by update, batch of that update and place in the batch of all processes."""
        training, now = self.model.training, self.state.global_step
        step, calls = self._rollouts_at[training]
        self._rollouts_at[training] = (now, calls + 1 if step == now else 0)
        key = [self.args.seed, int(training), *self._rollouts_at[training]]
        first = self.accelerator.process_index * num_images
        sources = (np.random.SeedSequence([*key, first + index]) for index in range(num_images))
        return [int(source.generate_state(1, np.uint64)[0] >> 1) for source in sources]

    @torch.no_grad()
    def _roll_out(self, rows: list[Row], stage: Stage) -> Rollout:
        """Draws pictures; equal prompts in a row are read once and share their prompt's cache."""
        device, is_training = self.accelerator.device, self.model.training
        keys = [Hasher.hash([row["prompt"], row.get("images"), row.get("image")]) for row in rows]
        runs = [list(run) for _, run in groupby(range(len(rows)), key=keys.__getitem__)]
        batch = self._read_prompts([rows[run[0]] for run in runs])
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        grids_of_prompts: Any = [ids.new_empty(0, 3)] * len(runs)
        if "image_grid_shw" in batch:
            grids_of_prompts = split_grids(ids, batch["image_grid_shw"].to(device), self._first_visual_id)
        k = stage.num_images
        generators = [torch.Generator(device).manual_seed(seed) for seed in self._seeds(len(rows) * k)]
        codes = ids.new_empty(len(rows) * k, self.schedule.num_tokens)
        settings = {
            "guidance_scale": self.args.guidance_scale,
            "image_temperature": self.temperature,
            "image_top_k": self.top_k,
            "image_top_p": self.top_p,
            "height": self.schedule.height,  # of all, whatever sizes the sources of edits have
            "width": self.schedule.width,
            "num_scales": self.schedule.num_scales,
            "cache_implementation": self.args.cache_implementation,
            **(self.args.generation_kwargs or {}),
        }
        rows_with_thoughts: list[torch.Tensor] = [ids[0]] * (len(rows) * k)
        if self.args.thinking:  # drawn from the whole distribution, unless `generation_kwargs` cut it
            length = self.args.max_completion_length
            text = {"do_sample": True, "temperature": self.temperature, "max_new_tokens": length}
            settings = {"thinking": True, "top_k": 0, "top_p": 1.0, **text, **settings}
        if stage.images_per_prefix > 1:
            settings |= {"prefix_scales": stage.prefix_scales, "images_per_prefix": stage.images_per_prefix}
        whole: Any = nullcontext(self.accelerator.unwrap_model(self.model_wrapped))
        if is_deepspeed_zero3_enabled():
            gather = self.args.ds3_gather_for_generation
            whole = unwrap_model_for_generation(self.model_wrapped, self.accelerator, gather_deepspeed3_params=gather)
        with whole as model, self.accelerator.autocast():
            model.eval()  # dropout (of adapters) is for learning
            # `generate` wants as many pictures of every prompt: runs of one length go together (mostly all do).
            for length in sorted({len(run) for run in runs}):
                chosen = [index for index, run in enumerate(runs) if len(run) == length]
                places = [row * k + i for index in chosen for row in runs[index] for i in range(k)]
                grids = torch.cat([grids_of_prompts[index] for index in chosen])
                output = model.generate(
                    input_ids=ids[chosen],
                    attention_mask=mask[chosen],
                    image_grid_shw=grids if len(grids) else None,
                    generation_mode="image",
                    num_return_sequences=length * k,
                    generator=[generators[place] for place in places],
                    return_dict_in_generate=True,
                    **settings,
                )
                codes[places] = output.image_codes
                if self.args.thinking:
                    sequences = output.sequences.as_subclass(torch.Tensor)
                    for place, row, real in zip(places, sequences, output.attention_mask, strict=True):
                        rows_with_thoughts[place] = row[real.bool()][: -codes.shape[1]]
            model.train(is_training)
        run_of_row = [index for index, run in enumerate(runs) for _ in run]
        drawn = ids.new_tensor([self.schedule.grid_shw])
        grids_of_rows = [torch.cat([grids_of_prompts[index], drawn]) for index in run_of_row]
        if not self.args.thinking:
            return Rollout(ids[run_of_row], mask[run_of_row], grids_of_rows, codes)
        read = mask.sum(1)[run_of_row].tolist()
        thoughts = [row[length:-1].tolist() for row, length in zip(rows_with_thoughts, read, strict=True)]
        pad: Any = partial(pad_sequence, batch_first=True, padding_side="left")
        whole_ids = pad(rows_with_thoughts, padding_value=self.processor.tokenizer.pad_token_id)
        whole_mask = pad([torch.ones_like(row) for row in rows_with_thoughts])
        return Rollout(whole_ids, whole_mask, grids_of_rows, codes, thoughts)

    # Scoring

    def _reward(
        self,
        rows: list[Row],
        pictures: list[Image.Image],
        codes: torch.Tensor,
        thoughts: list[list[int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rewards `(pictures of all processes, functions)`, NaN for None, and the pixels `(pictures, H, W)` that
        decide them, the union over all functions that say (None: all pixels do).
        """
        masks_of: list[list[Any]] = []
        inputs = [
            {**{name: value for name, value in row.items() if name != "image"}, "images": picture, "masks_of": masks_of}
            for row, picture in zip(rows, pictures, strict=True)
        ]
        sources = [self._read_prompt(row)[1] for row in rows]
        if any(sources):
            for row, source in zip(inputs, sources, strict=True):
                row["source_images"] = source
        prompts, ids = [row["prompt"] for row in rows], (codes + self._first_visual_id).tolist()
        texts = [""] * len(rows)
        if thoughts is not None:
            texts = self._read_thoughts(thoughts)
            start = list(self.processor.image_start_ids)
            ids = [[*thought, *start, *row] for thought, row in zip(thoughts, ids, strict=True)]
            for row, text in zip(inputs, texts, strict=True):
                row["thoughts"] = text
        completions: list[Any] = [text + self.processor.image_token for text in texts]
        if not isinstance(prompts[0], str):
            completions = []
            for text, picture in zip(texts, pictures, strict=True):
                parts = [{"type": "text", "text": text}] if text else []
                content = [*parts, {"type": "image", "image": picture}]
                completions.append([{"role": "assistant", "content": content}])
        rewards = self._calculate_rewards(inputs, prompts, completions, ids)
        size = self.schedule.height, self.schedule.width
        unions = [torch.stack([_mask_of_size(mask, size) for mask in masks]) for masks in masks_of]
        return rewards, torch.stack(unions).any(0) if unions else None

    def _read_thoughts(self, thoughts: list[list[int]]) -> list[str]:
        texts = self.processor.tokenizer.batch_decode(thoughts, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        mode, stage = "train" if self.model.training else "eval", self._stage()
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        start = time.perf_counter()
        rollout = self._roll_out(inputs, stage)
        pictures = self.processor.decode_codes(rollout.codes, [self.schedule.grid_shw] * len(rollout.codes))
        drawn = time.perf_counter()
        rows = [row for row in inputs for _ in range(stage.num_images)]
        rewards_per_function, masks = self._reward(rows, pictures, rollout.codes, rollout.thoughts)
        self._metrics[mode]["time/rollout"].append(drawn - start)
        self._metrics[mode]["time/reward"].append(time.perf_counter() - drawn)

        rewards = (rewards_per_function * self.reward_weights.to(rewards_per_function)).nansum(1)
        rewards = rewards.masked_fill(rewards_per_function.isnan().all(1), torch.nan)
        values = rewards
        if stage.num_images > 1:
            values = middle_returns(rewards.view(-1, stage.num_images), self.args.middle_return_temperature)
        if group_size > 1:
            advantages = group_advantages(values, group_size, self.scale_rewards)
        else:  # an evaluation with one picture per prompt compares nothing
            advantages = torch.zeros_like(values)
        self._log_rewards(mode, rewards_per_function, rewards, values, group_size)
        advantages_of_pictures = advantages.repeat_interleave(stage.num_images)
        self._log_pictures(rows, pictures, rewards_per_function, advantages_of_pictures, rollout.thoughts)

        first = self.accelerator.process_index * len(inputs)
        codes = rollout.codes[:: stage.num_images]
        begin, end = (self.schedule.offsets[scale] for scale in (stage.scales.start, stage.scales.stop))
        weights = scale_weights(self.schedule, stage.scales, self.args.scale_reweight_alpha, codes.device)
        weights = weights.expand(len(inputs), -1)
        if masks is not None:
            masks = masks.view(len(inputs), stage.num_images, *masks.shape[1:]).any(1)
            weights = weights * propagate_mask(masks, self.schedule, stage.scales).to(weights)
        given = codes[:, :begin] + self._first_visual_id
        output = {
            "prompt_ids": torch.cat([rollout.prompt_ids, given], dim=1),
            "prompt_mask": torch.cat([rollout.prompt_mask, torch.ones_like(given)], dim=1),
            "completion_ids": codes[:, begin:end] + self._first_visual_id,
            "completion_mask": torch.ones_like(codes[:, begin:end]),
            "advantages": advantages[first : first + len(inputs)],
            "weights": weights.contiguous(),
            "image_grids": rollout.grids,
        }
        if rollout.thoughts is not None:
            self._add_thoughts(output, rollout.thoughts)
        with torch.no_grad():
            # A batch that is used within one update is scored by its first pass; see `_compute_loss`.
            if self.args.gradient_accumulation_steps % self.args.steps_per_generation:
                output["old_log_probs"] = self._log_probs_of_all(self.model, output)
            if self.beta != 0 and self.ref_model is not None:
                output["reference_log_probs"] = self._log_probs_of_all(self.ref_model, output)
            elif self.beta != 0:
                policy: Any = self.accelerator.unwrap_model(self.model)
                with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                    output["reference_log_probs"] = self._log_probs_of_all(self.model, output)
        return output

    def _add_thoughts(self, output: dict[str, Any], thoughts: list[list[int]]) -> None:
        """Moves thoughts and `<boi>`, the last T + 1 columns of the prompts, into what is trained.

        That a thought ends is a choice of the model like its words, unless it has come to its limit.
        """
        limit, lengths = self.args.max_completion_length, output["weights"].new_tensor([len(t) for t in thoughts])
        longest = int(lengths.max())
        weights = (torch.arange(longest + 1, device=lengths.device) >= longest - lengths[:, None]).to(output["weights"])
        weights[:, -1] = (lengths < limit).to(weights)
        output["weights"] = torch.cat([weights, output["weights"]], dim=1)
        for kind in ("ids", "mask"):
            prompts, completions = output[f"prompt_{kind}"], output[f"completion_{kind}"]
            output[f"prompt_{kind}"] = prompts[:, : -longest - 1].contiguous()
            output[f"completion_{kind}"] = torch.cat([prompts[:, -longest - 1 :], completions], dim=1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        lengths = self.accelerator.gather(lengths)
        metrics["thoughts/mean_length"].append(float(lengths.mean()))
        metrics["thoughts/clipped_ratio"].append(float((lengths >= limit).float().mean()))

    def _log_probs_of_all(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of a whole batch, a part of the size of a training batch at a time."""
        size = self.args.per_device_train_batch_size
        starts = range(0, len(inputs["prompt_ids"]), size)
        parts = ({name: value[i : i + size] for name, value in inputs.items()} for i in starts)
        return torch.cat([self._log_probs(model, part)[0] for part in parts])

    def _log_probs(self, model, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of what is trained, `(B, n)` both: teacher forcing, without guidance.

        That are codes, and with `thinking` a thought and its end before them, `(B, T + 1 + n)`; 0 where there is none.
        """
        completion_ids, thinking = inputs["completion_ids"], self.args.thinking
        with self.accelerator.autocast():
            logits = model(
                input_ids=torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                image_grid_shw=torch.cat(inputs["image_grids"]),
                logits_to_keep=completion_ids.shape[1] + 1,
                visual_logits=not thinking,
                use_cache=False,
            ).logits[:, :-1]
        first = self._first_visual_id
        if not thinking:
            return code_log_probs(logits, completion_ids - first, self.temperature)
        policy: Any = self.accelerator.unwrap_model(self.model)
        config, generation = policy.config, policy.generation_config
        start = completion_ids.shape[1] - self.schedule.offsets[self.args.num_trained_scales]
        ends = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
        ends = {config.boi_token_id, *(ends if isinstance(ends, list) else [ends])}
        forbidden = [token for token in (config.eoi_token_id, config.image_token_id) if token is not None]
        text = (logits[:, :start, :first], completion_ids[:, :start], forbidden, sorted(ends), self.temperature)
        codes = code_log_probs(logits[:, start:, first:], completion_ids[:, start:] - first, self.temperature)
        pairs = zip(thought_log_probs(*text), codes, strict=True)
        log_probs, entropies = (torch.cat(pair, dim=1) * (inputs["weights"] > 0) for pair in pairs)
        return log_probs, entropies

    # Learning

    def _compute_loss(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        mode = "train" if self.model.training else "eval"
        log_probs, entropies = self._log_probs(model, inputs)
        # The buffer keeps this dictionary: later iterations over the same batch find what the first pass saw.
        old_log_probs = inputs.setdefault("old_log_probs", log_probs.detach())
        loss, ratios, is_clipped, kl = policy_loss(
            log_probs,
            old_log_probs,
            inputs["advantages"],
            inputs["weights"],
            (self.epsilon_low, self.epsilon_high),
            inputs.get("reference_log_probs"),
            self.beta,
        )
        metrics = {"entropy": entropies, "clip_ratio/region_mean": is_clipped.float(), "ratio/max": ratios}
        if self.beta != 0:
            metrics["kl"] = kl
        trained = inputs["weights"] > 0 if self.args.thinking else torch.ones_like(ratios, dtype=torch.bool)
        for name, values in metrics.items():
            values = self.accelerator.gather(values.max() if name == "ratio/max" else values[trained].mean())
            self._metrics[mode][name].append(float(values.max() if name == "ratio/max" else values.mean()))
        return loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    # Logging

    def _log_rewards(self, mode: str, per_function, rewards, values, group_size: int):
        metrics = self._metrics[mode]
        for name, column in zip(self.reward_func_names, per_function.unbind(1), strict=True):
            known = column[~column.isnan()]
            metrics[f"rewards/{name}/mean"].append(float(known.mean()))
            metrics[f"rewards/{name}/std"].append(float(known.std(correction=0)) if len(known) else math.nan)
            metrics[f"rewards/{name}/unscored"].append(float(len(column) - len(known)))
        known = rewards[~rewards.isnan()]
        metrics["reward"].append(float(known.mean()))
        metrics["reward_std"].append(float(known.std(correction=0)) if len(known) else math.nan)
        groups = values.view(-1, group_size).nan_to_num(0)
        metrics["frac_reward_zero_std"].append(float((groups.amax(1) == groups.amin(1)).float().mean()))
        # What reward functions logged with TRL's `log_metric`; all processes must ask for the same names in one order.
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            share = torch.tensor([[sum(values), len(values)]], dtype=torch.float64, device=rewards.device)
            total, count = self.accelerator.gather(share).sum(0).tolist()
            metrics[name].append(total / count)
        self._pending_metrics.clear()

    def _log_pictures(self, rows: list[Row], pictures: list[Image.Image], per_function, advantages, thoughts):
        """For TRL's table of completions: texts, rewards, and the pictures as files beside it."""
        if not self.log_completions:
            self._pending_extra_logs.clear()
            return
        files = [""] * len(pictures)
        step, every = self.state.global_step + 1, max(1, int(self.state.logging_steps or 1))
        if step % every == 0:
            kind = "step" if self.model.training else "eval"
            folder = Path(self.args.output_dir) / "completions" / f"{kind}_{step:05d}"
            folder.mkdir(parents=True, exist_ok=True)
            first = self.accelerator.process_index * len(pictures)
            files = [str(folder / f"{first + index:04d}.png") for index in range(len(pictures))]
            for file, picture in zip(files, pictures, strict=True):
                picture.save(file)
        texts = [self._read_prompt(row)[0] for row in rows]
        self._logs["prompt"].extend(gather_object(texts))
        written = [""] * len(rows) if thoughts is None else self._read_thoughts(thoughts)
        self._logs["completion"].extend(gather_object([text + self.processor.image_token for text in written]))
        self._logs["extra"]["image"].extend(gather_object(files))
        for name, column in zip(self.reward_func_names, per_function.unbind(1), strict=True):
            self._logs["rewards"][name].extend(column.tolist())
        self._logs["advantages"].extend(advantages.tolist())
        if self.log_multimodal:
            self._logs["images"].extend(gather_object([[picture] for picture in pictures]))
        # What reward functions logged with TRL's `log_extra`.
        for name in sorted(set(gather_object(list(self._pending_extra_logs)))):
            self._logs["extra"][name].extend(gather_object(self._pending_extra_logs.get(name, [None] * len(rows))))
        self._pending_extra_logs.clear()


class _StepTimes(TrainerCallback):
    """Logs how long an update took beside its rollouts and rewards."""

    def __init__(self, trainer: NextFlowGRPOTrainer):
        self.trainer, self.start, self.elsewhere = trainer, 0.0, 0.0

    def _spent(self) -> float:
        metrics = self.trainer._metrics["train"]
        return sum(metrics["time/rollout"]) + sum(metrics["time/reward"])

    def on_step_begin(self, args, state, control, **kwargs):
        self.start, self.elsewhere = time.perf_counter(), self._spent()

    def on_step_end(self, args, state, control, **kwargs):
        update = time.perf_counter() - self.start - (self._spent() - self.elsewhere)
        self.trainer._metrics["train"]["time/update"].append(update)


def _mask_of_size(mask: Any, size: tuple[int, int]) -> torch.Tensor:
    """A mask of any resolution, bool `(H, W)`; ones for None."""
    if mask is None:
        return torch.ones(size, dtype=torch.bool)
    mask = torch.as_tensor(np.asarray(mask))
    if mask.ndim != 2:
        raise ValueError(f"A mask must have shape (height, width), but got shape {tuple(mask.shape)}.")
    return F.adaptive_max_pool2d(mask[None].bool().float(), size)[0] > 0  # no pixel that is in may be lost
