"""What all trainers share: a reproducible order of the data, whole checkpoints, folders that load."""

import copy
import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel, PromptLearningConfig
from torch.utils.data import Sampler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..processing_nextflow import IMAGE_TOKENIZER_FOLDER, NextFlowProcessor

logger = logging.getLogger(__name__)

RUN_FILE = "nextflow_run.json"


class EpochSampler(Sampler[int]):
    """
    Indices in an order that is a function of seed and epoch alone.

    Args:
        num_samples (`int`): Of the data set.
        seed (`int`, *optional*, defaults to 0): Of the order.
        shuffle (`bool`, *optional*, defaults to `True`): False keeps the order of the data set.
        numbered (`bool`, *optional*, defaults to `False`): Give `epoch * num_samples + index` in place of the index.
    """

    def __init__(self, num_samples: int, seed: int = 0, shuffle: bool = True, numbered: bool = False):
        self.num_samples, self.seed, self.shuffle, self.numbered, self.epoch = num_samples, seed, shuffle, numbered, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self):
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        yield from (order + self.numbered * self.epoch * self.num_samples).tolist()


def what_is_missing(folder: str | Path) -> str | None:
    """Why a checkpoint is not whole, in words; None if it is.

    `trainer_state.json` is written last, after `nextflow_run.json`, which lists all other files and their sizes. Half
    of a JSON object can't be read, so it needs no renaming.
    """
    folder = Path(folder)
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        files = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("files", {})
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return next(
        (
            f"{name} is missing or cut off"
            for name, size in files.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != size
        ),
        None,
    )


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    """The last whole `checkpoint-N` of a run; those that a kill left half written are passed over."""
    numbered = [(path.name.rpartition("-")[2], path) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    for _, path in sorted(((int(number), path) for number, path in numbered if number.isdigit()), reverse=True):
        if (missing := what_is_missing(path)) is None:
            return str(path)
        logger.warning("%s is passed over, it is not whole: %s.", path, missing)
    return None


class NextFlowTrainerMixin:
    """What [`NextFlowSFTTrainer`], [`NextFlowGRPOTrainer`] and [`NextFlowImageTokenizerTrainer`] have in common.

    It stands before transformers' `Trainer`.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    model: Any
    save_model: Any
    processor: NextFlowProcessor | None = None  # saved with the model
    _card_facts: tuple[str, ...] = ()  # lines of the model card
    _epoch_sampler: Any = None
    _image_tokenizer_files: Path | None = None  # the last copy on disk

    # Order

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__") or args.train_sampling_strategy not in ("random", "sequential"):
            return super()._get_train_sampler(train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        self._epoch_sampler = EpochSampler(len(dataset), seed, args.train_sampling_strategy == "random")
        return self._epoch_sampler

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # the run was finished already
            self.control.should_training_stop = True
            return
        if self._epoch_sampler is not None:  # accelerate does not reach it through all of its wrappers
            self._epoch_sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]  # the trainer's

    # Checkpoints

    def _run_facts(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        return {"num_processes": self.accelerator.num_processes}

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
            `ValueError`: if there is none, it is not whole, or it is of a run with other packs or processes.
        """
        words: dict[str, Any] = {"true": True, "false": None, "none": None}
        folder = words.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        if folder is True and (folder := find_last_checkpoint(self.args.output_dir)) is None:
            raise ValueError(
                f'"{self.args.output_dir}" has no whole checkpoint to go on from. Start the run without '
                "`resume_from_checkpoint`, or name the folder of another run."
            )
        if folder:
            if missing := what_is_missing(folder):
                raise ValueError(
                    f'"{folder}" is not a whole checkpoint ({missing}). `resume_from_checkpoint=True` takes the last '
                    "whole one."
                )
            then, now = json.loads(Path(folder, RUN_FILE).read_text(encoding="utf-8")), self._run_facts()
            then.pop("files", None)
            changed = [
                f"`{name}` was {then[name]}, now {now.get(name)}" for name in then if then[name] != now.get(name)
            ]
            if changed:
                raise ValueError(
                    f"The run in {folder} can't go on: {'; '.join(changed)}. The data would come in another order. "
                    "Resume it as it was, or start a new run from its weights."
                )
        return super().train(folder, *args, **kwargs)  # type: ignore[misc]  # the trainer's

    # Folders

    def _save(self, output_dir=None, state_dict=None):
        processor = self.processor
        given, self.processing_class = self.processing_class, None if processor else self.processing_class
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = given
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        (folder / "README.md").write_text(self._model_card(), encoding="utf-8")
        if processor is None:
            return
        words = copy.copy(processor)
        words.image_tokenizer = None
        words.save_pretrained(folder)
        if processor.image_tokenizer is None or isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            return  # an adapter is loaded into a folder that has one
        own, last = folder / IMAGE_TOKENIZER_FOLDER, self._image_tokenizer_files
        if last is not None and last.is_dir() and not own.exists():
            shutil.copytree(last, own, copy_function=_link)  # it is frozen: all checkpoints share one copy
        else:
            processor.image_tokenizer.save_pretrained(own)
        self._image_tokenizer_files = own

    def save_merged(self, folder: str) -> None:
        """Merges the adapters of PEFT into the model, for good, and saves a whole model that loads everywhere."""
        self.model = self.accelerator.unwrap_model(self.model).merge_and_unload()
        self.save_model(folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes our model card, in place of TRL's stock text."""
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
            Path(self.args.output_dir, "README.md").write_text(self._model_card(), encoding="utf-8")

    def _model_card(self) -> str:
        model: Any = self.accelerator.unwrap_model(self.model)
        base, args = Path(str(getattr(model.config, "_name_or_path", "") or "a new model")).name, self.args
        names = {field.name for field in dataclasses.fields(args) if field.name in vars(type(args))["__annotations__"]}
        names |= {"learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size"}
        settings = [f"- `{name}`: {getattr(args, name)!s}" for name in sorted(names)]
        load = f"{type(model).__name__}.from_pretrained(folder)"
        if isinstance(model, PeftModel):
            load = "PeftModel.from_pretrained(NextFlowForCausalLM.from_pretrained(base), folder)"
        elif self.processor is not None and self.processor.image_tokenizer is not None:
            load = (
                "NextFlowPipeline.from_pretrained(folder)  # or AutoModelForMultimodalLM, AutoProcessor, pipeline(...)"
            )
        return "\n".join(
            [
                "---\nlibrary_name: transformers\ntags: [nextflow]\n---",
                f"# {Path(args.output_dir).name}\n",
                f"Trained from {base} with `{type(self).__name__}` of transformers-nextflow, "
                f"{self.state.global_step} steps. Nobody has evaluated it here; licence and limits are those of its "
                "base and its data.\n",
                *(f"- {fact}" for fact in self._card_facts),
                f"\n```python\n{load}\n```\n\n## Settings\n",
                *settings,
                "",
            ]
        )


def _link(source: str, target: str) -> None:
    """Another name of the same file; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def find_processor(model: Any, processing_class: Any) -> NextFlowProcessor | None:
    """The processor to save with a model: the one given, or that of the model's own folder with the tokenizer given."""
    if isinstance(processing_class, NextFlowProcessor):
        return processing_class
    try:
        processor = NextFlowProcessor.from_pretrained(model.config._name_or_path)
    except (OSError, ValueError) as error:
        logger.warning(
            "The model's folder has no processor (%s), and none was given as `processing_class`: what is saved will "
            "not draw by itself. Pass `processing_class=NextFlowProcessor.from_pretrained(...)`.",
            error,
        )
        return None
    if processing_class is not None:
        processor.tokenizer = processing_class
    return processor


def own_config(model: Any) -> None:
    """Gives a model a config of its own, so that what training changes in it is not the caller's."""
    old, new = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def check_start(model: Any, tokenizer: Any, peft_config: Any = None) -> None:
    """Refuses adapters and vocabularies that can't be trained, and warns of weights too coarse for small steps."""
    configs = [peft_config, *getattr(model, "peft_config", {}).values()]
    if any(isinstance(config, PromptLearningConfig) for config in configs):
        raise ValueError(
            "PEFT's prompt learning (prefix tuning, prompt tuning, p-tuning) puts virtual tokens before the prompt, "
            "which NextFlow's positions have no place for. NextFlow's prefix-tuning trains the coarse scales: it is "
            "`num_trained_scales` of NextFlowGRPOConfig. For few weights use LoRA."
        )
    first = getattr(model.config, "text_vocab_size", None)
    if tokenizer is not None and first is not None and max(tokenizer.get_vocab().values()) >= first:
        raise ValueError(
            f"The tokenizer has ids up to {max(tokenizer.get_vocab().values())}, but ids from {first} on "
            "(`text_vocab_size`) are codes of pictures: `add_tokens` took the first of them. Give new tokens ids that "
            "the text leaves unused, or convert the model with a larger `text_vocab_size`."
        )
    coarse = {p.dtype for p in model.parameters() if p.requires_grad and p.is_floating_point() and p.itemsize < 4}
    if coarse and peft_config is None and not getattr(model, "is_quantized", False):
        logger.warning(
            "The weights to train are %s: it keeps 8 to 11 bits, so steps of a small learning rate (1e-5) round to "
            "nothing for most weights. Load the model with `dtype=torch.float32`, and compute in low precision with "
            "`bf16=True`.",
            ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in coarse)),
        )


__all__ = [
    "EpochSampler",
    "NextFlowTrainerMixin",
    "check_start",
    "find_last_checkpoint",
    "find_processor",
    "own_config",
]
