"""What all trainers share: a reproducible order of the data, whole checkpoints, folders that load."""

import copy
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from peft import PeftModel, PromptLearningConfig
from transformers import AutoModelForMultimodalLM, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..codebook import check_same_codebook
from ..pipeline_index import write_pipeline_index
from ..processing_nextflow import IMAGE_TOKENIZER_FOLDER, NextFlowProcessor
from ..processing_tokenflow import PROCESSORS
from .agreement import refuse_other_data
from .packing import EpochSampler

logger = logging.getLogger(__name__)

RUN_FILE = "nextflow_run.json"
TRAINED_WEIGHTS_FILE = "trained_weights.pt"  # beside their average, which the checkpoint's model is
_Trainer: Any = object  # in whose place transformers' `Trainer` stands


def what_is_missing(folder: str | Path) -> str | None:
    """Why a checkpoint is not whole, in words; None if it is.

    `trainer_state.json` is written last, after `nextflow_run.json`, which lists all other files and their sizes.
    """
    folder = Path(folder)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        files = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("files", {})
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    for name, size in files.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"{name} is missing or cut off"
    return None


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    """The last whole `checkpoint-N` of a run; those that a kill left half written are passed over."""
    numbers = [path.name.rpartition("-")[2] for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for number in sorted(filter(str.isdigit, numbers), key=int, reverse=True):
        folder = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{number}")
        if (missing := what_is_missing(folder)) is None:
            return str(folder)
        logger.warning("%s is passed over, it is not whole: %s.", folder, missing)
    return None


class NextFlowTrainerMixin(_Trainer):
    """What [`NextFlowSFTTrainer`], [`NextFlowGRPOTrainer`] and [`NextFlowImageTokenizerTrainer`] have in common.

    It stands before transformers' `Trainer`.
    """

    processor: NextFlowProcessor | None = None  # saved with the model
    _card_facts: tuple[str, ...] = ()  # lines of the model card
    _epoch_sampler: Any = None
    _image_tokenizer_files: Path | None = None  # the last copy on disk
    ema: EMAModel | None = None  # with `args.ema_decay`, from the start of the training on
    _is_averaged = False

    def __init__(self, *args, **kwargs):
        # Of training and of evaluation, by name: a sum and the number of what was added up.
        self._sums: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:  # TRL's trainers say so themselves
            raise ValueError(
                f"One process sees {self.args.n_gpu} GPUs, and `nn.DataParallel` is not supported: start a process for "
                "each GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        if getattr(self.args, "ema_decay", None) is not None:
            self.add_callback(_MoveAverage(self))

    # Order

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset=None, **options):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not hasattr(dataset, "__len__") or strategy not in ("random", "sequential"):
            return super()._get_train_sampler(train_dataset)
        options = {"shuffle": strategy == "random", **options}
        self._epoch_sampler = EpochSampler(len(dataset), self._data_seed, **options)
        return self._epoch_sampler

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # the run was finished already
            self.control.should_training_stop = True
            return
        if self._epoch_sampler is not None:  # accelerate does not reach it through all of its wrappers
            self._epoch_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    @property
    def _cuts_weights(self) -> bool:
        """Whether a rank holds pieces of weights only."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled() or self.is_distributed_loading_by_transformers

    # The average of the weights

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        model: Any = self.accelerator.unwrap_model(self.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if (decay := getattr(self.args, "ema_decay", None)) is not None:
            self._start_average(decay, resume_from_checkpoint)
        return prepared

    @torch.no_grad()
    def _start_average(self, decay: float, checkpoint: str | None) -> None:
        """The weights are their average so far: those of a new run, or of a checkpoint's model."""
        if self._cuts_weights:
            raise ValueError("`ema_decay` averages whole weights, which FSDP, TP and ZeRO-3 cut into pieces: use DDP.")
        trained = self._trained()
        if coarse := [name for name, parameter in trained.items() if parameter.itemsize < 4]:
            raise ValueError(
                f"`ema_decay` needs float32, but {coarse[0]} is {trained[coarse[0]].dtype}, in which small steps of an "
                "average round to nothing: load the model with `dtype=torch.float32`."
            )
        self.ema = EMAModel(trained.values(), decay=decay, use_ema_warmup=True, foreach=True)
        if checkpoint is not None:
            self.ema.optimization_step = self.state.global_step
            weights = torch.load(Path(checkpoint, TRAINED_WEIGHTS_FILE), map_location="cpu", weights_only=True)
            for name, parameter in trained.items():
                parameter.copy_(weights[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the average of its weights inside, if one is kept."""
        if self.ema is None or self._is_averaged:
            yield
            return
        self.ema.store(self._trained().values())
        self.ema.copy_to(self._trained().values())
        self._is_averaged = True
        try:
            yield
        finally:
            self._is_averaged = False
            self.ema.restore(self._trained().values())

    def evaluate(self, *args, **kwargs):
        """As in transformers, of the average of the weights if one is kept."""
        with self.averaged():
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, the average of the weights if one is kept."""
        with self.averaged():
            super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:  # its weights are an average
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self._trained().values()]

    # Logging

    def _count(self, training: bool, name: str, entry: torch.Tensor) -> None:
        """Adds a sum and a number, `(2,)`, to what is logged as their quotient; every rank counts the same names."""
        self._sums[training][name] = self._sums[training].get(name, 0) + entry

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what was counted since the last time, as `NAME` and `eval_NAME`."""
        names = [name for name in logs if name == "loss" or (name.endswith("_loss") and name != "train_loss")]
        sums = self._sums[names[0] == "loss"] if names else {}
        if sums:
            entries = self.accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist()
            for name, (total, number) in zip(sums, entries, strict=True):
                if number:
                    logs[names[0].removesuffix("loss") + name] = round(total / number, 6)
            sums.clear()
        super().log(logs, start_time)

    # Checkpoints

    def _run_facts(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        return {
            "num_processes": self.accelerator.num_processes,
            "ema": getattr(self.args, "ema_decay", None) is not None,
        }

    def _save_run_state(self, folder: Path) -> None:
        """Writes what a trainer needs for resuming, beside transformers' files; called on every rank."""

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:  # what is written over is not whole from now on
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        self._save_run_state(folder)
        if self.ema is not None and self.args.should_save:
            torch.save(dict(self._trained()), folder / TRAINED_WEIGHTS_FILE)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            names = [path for path in folder.rglob("*") if path.is_file() and path.name != RUN_FILE]
            files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in names}
            (folder / RUN_FILE).write_text(json.dumps(self._run_facts() | {"files": files}), encoding="utf-8")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in transformers; goes on from the last *whole* checkpoint, and only with what is the same run.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A folder; or True (also `"true"`, as command lines give it), the last whole one of `args.output_dir`.

        Raises:
            `ValueError`: if there is none, it is not whole, or it is of a run with other packs, processes or parts; if
                the ranks have different data.
        """
        if self.accelerator.num_processes > 1:
            refuse_other_data(self.train_dataset)
        folder: Any = resume_from_checkpoint
        if str(folder).lower() in ("true", "false", "none"):
            folder = str(folder).lower() == "true"
        if folder is True and (folder := find_last_checkpoint(self.args.output_dir)) is None:
            raise ValueError(
                f'"{self.args.output_dir}" has no whole checkpoint to go on from. Start the run without '
                "`resume_from_checkpoint`, or name the folder of another run."
            )
        if not folder and (last := find_last_checkpoint(self.args.output_dir)) is not None:
            logger.warning(
                "%s is of an earlier run, and this one starts over and writes over its checkpoints. To go on from it, "
                "train with `resume_from_checkpoint=True` (on the command line `--resume_from_checkpoint true`).",
                last,
            )
        if folder:
            if missing := what_is_missing(folder):
                raise ValueError(
                    f'"{folder}" is not a whole checkpoint ({missing}). `resume_from_checkpoint=True` takes the last '
                    "whole one."
                )
            then, now = json.loads(Path(folder, RUN_FILE).read_text(encoding="utf-8")), self._run_facts()
            if names := [name for name, value in now.items() if name in then and then[name] != value]:
                changed = "; ".join(f"`{name}` was {then[name]}, now {now[name]}" for name in names)
                way_out = "Resume it as it was"
                if {"samples_per_step", "packs_per_step"} & set(names):
                    way_out += " (a step's number is that of processes, times `gradient_accumulation_steps`, and of "
                    way_out += "samples times `per_device_train_batch_size`)"
                raise ValueError(
                    f"The run in {folder} can't go on: {changed}. {way_out}, or start a new run from its weights."
                )
        return super().train(folder, *args, **kwargs)

    # Folders

    def _save(self, output_dir=None, state_dict=None):
        processor, given = self.processor, self.processing_class
        self.processing_class = None if processor else given
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = given
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / "README.md").write_text(self._model_card(), encoding="utf-8")
        model: Any = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel) and hasattr(model, "generation_config"):
            model.generation_config.save_pretrained(folder)  # it says how the adapter was prompted
        if processor is None:
            return
        words = copy.copy(processor)
        words.image_tokenizer = None
        words.save_pretrained(folder)
        if processor.image_tokenizer is None or isinstance(model, PeftModel):
            return  # an adapter is loaded into a folder that has one
        own = folder / IMAGE_TOKENIZER_FOLDER
        try:  # it is frozen: all checkpoints share one copy on disk
            shutil.copytree(self._image_tokenizer_files or "", own, copy_function=os.link)
        except OSError:  # there is none yet, or the file system has no links
            processor.image_tokenizer.save_pretrained(own)
        self._image_tokenizer_files = own
        write_pipeline_index(folder)

    def save_merged(self, folder: str) -> None:
        """Merges the adapters of PEFT into the model, for good, and saves a whole model that loads everywhere."""
        if self.ema is not None:
            self.ema.copy_to(self._trained().values())
            self.ema = None
        self.model: Any = self.accelerator.unwrap_model(self.model).merge_and_unload()
        self.save_model(folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes our model card, in place of TRL's stock text."""
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
            Path(self.args.output_dir, "README.md").write_text(self._model_card(), encoding="utf-8")

    def _how_to_load(self, model: Any) -> str:
        if isinstance(model, PeftModel):
            return f"{type(model.get_base_model()).__name__}.from_pretrained(folder)  # with its base"
        if self.processor is not None and self.processor.image_tokenizer is not None:
            return "NextFlowPipeline.from_pretrained(folder)"
        return f"{type(model).__name__}.from_pretrained(folder)"

    def _model_card(self) -> str:
        model: Any = self.accelerator.unwrap_model(self.model)
        base, args = Path(getattr(model.config, "_name_or_path", "") or "a new model").name, self.args
        names = {"learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size"}
        settings = "\n".join(
            f"- `{n}`: {getattr(getattr(args, n), 'value', getattr(args, n))!s}"
            for n in sorted(names.union(type(args).__annotations__))
        )
        facts = "".join(f"- {fact}\n" for fact in self._card_facts)
        return f"""---
library_name: transformers
tags: [nextflow]
---
# {Path(args.output_dir).name}

Trained from {base} with `{type(self).__name__}` of transformers-nextflow, {self.state.global_step} steps. Nobody has \
evaluated it here; licence and limits are those of its base and its data.

{facts}
```python
{self._how_to_load(model)}
```

## Settings

{settings}
"""


class _MoveAverage(TrainerCallback):
    """Moves the average after each step of the optimizer."""

    def __init__(self, trainer: NextFlowTrainerMixin):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.ema is not None:
            self.trainer.ema.step(self.trainer._trained().values())


def copy_settings(args: Any, kind: Any, output_dir: str) -> Any:
    """A trainer's own copy of its settings, in which it may fill in what is left open."""
    args = args or kind(output_dir)
    if not isinstance(args, kind):
        raise TypeError(f"`args` must be a `{kind.__name__}`, but got {type(args).__name__}.")
    return copy.copy(args)


def load_model(model: Any, args: Any, processing_class: Any, peft_config: Any) -> tuple[Any, NextFlowProcessor | None]:
    """The language model, with a config that is not the caller's, and its processor, which fit together."""
    if isinstance(model, str):
        options = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
        model = AutoModelForMultimodalLM.from_pretrained(model, **options)
        args.model_init_kwargs = None
    processor = processing_class if isinstance(processing_class, NextFlowProcessor) else None
    if processor is None:
        try:
            processor = PROCESSORS[model.config.model_type].from_pretrained(model.config._name_or_path)
            processor.tokenizer = processing_class or processor.tokenizer
        except (OSError, ValueError) as error:
            logger.warning(
                "The model's folder has no processor (%s), and none was given as `processing_class`: what is saved "
                "will not draw by itself. Pass `processing_class=NextFlowProcessor.from_pretrained(...)`.",
                error,
            )
    check_start(model, processor.tokenizer if processor else processing_class, peft_config)
    old, new = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    check_same_codebook(model.config, getattr(processor, "image_tokenizer", None))
    return model, processor


def check_start(model: Any, tokenizer: Any = None, peft_config: Any = None) -> None:
    """Refuses adapters and vocabularies that can't be trained, and warns of weights too coarse for small steps."""
    configs = [peft_config, *getattr(model, "peft_config", {}).values()]
    if any(isinstance(config, PromptLearningConfig) for config in configs):
        raise ValueError(
            "PEFT's prompt learning (prefix tuning, prompt tuning, p-tuning) puts virtual tokens before the prompt, "
            "which NextFlow's positions have no place for. NextFlow's prefix-tuning trains the coarse scales: it is "
            "`num_trained_scales` of NextFlowGRPOConfig. For few weights use LoRA."
        )
    last_id = max(tokenizer.get_vocab().values()) if tokenizer is not None else -1
    if last_id >= (first := getattr(model.config, "text_vocab_size", last_id + 1)):
        raise ValueError(
            f"The tokenizer has ids up to {last_id}, but ids from {first} on (`text_vocab_size`) are codes of "
            "pictures: `add_tokens` took the first of them. Give new tokens ids that the text leaves unused, or "
            "convert the model with a larger `text_vocab_size`."
        )
    coarse = {p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point() and p.itemsize < 4}
    if coarse and peft_config is None and not getattr(model, "is_quantized", False):
        logger.warning(
            "The weights to train are %s: it keeps 8 to 11 bits, so steps of a small learning rate (1e-5) round to "
            "nothing for most weights. Load the model with `dtype=torch.float32`, and compute in low precision with "
            "`bf16=True`.",
            ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in coarse)),
        )
