"""Trains a NextFlow checkpoint on TRL: alignment, pretraining, fine-tuning, LoRA, each a file of settings.

    python examples/sft.py --config examples/configs/sft.yaml --pictures FOLDER --output_dir runs/sft
    python examples/sft.py --config examples/configs/alignment.yaml --codes runs/codes --output_dir runs/alignment
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/sft.py \\
        --config examples/configs/pretraining.yaml --codes runs/codes --output_dir runs/pretraining

FOLDER is an "imagefolder" of the library datasets: pictures and a `metadata.jsonl` with lines such as
`{"file_name": "0001.png", "text": "a teal hexagon"}`; its pictures are encoded once, and datasets keeps the codes. For
more than a few thousand pictures, or for conversations, run examples/extract_codes.py first and give its output to
`--codes`; a data list mixes its sources by weight (`--data_list data.yaml --codes runs/codes`). Every field of
`NextFlowSFTConfig` and of TRL's `ModelConfig` is an option, on the command line or in the YAML file. On a CPU add
`--use_cpu true --bf16 false`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import (
    NextFlowSFTConfig,
    NextFlowSFTTrainer,
    encode_messages,
    load_coded_dataset,
    mix_coded_datasets,
    read_data_list,
)


@dataclass
class Data:
    """What is trained on."""

    pictures: str | None = field(default=None, metadata={"help": "Folder of pictures with a metadata.jsonl."})
    codes: list[str] | None = field(
        default=None, metadata={"help": "Coded samples, from examples/extract_codes.py: one folder or several."}
    )
    eval_codes: list[str] | None = field(
        default=None, metadata={"help": "Held-out coded samples; a folder's losses are logged under its name."}
    )
    data_list: str | None = field(
        default=None, metadata={"help": "YAML of the sources whose codes are in folders of `--codes`, and weights."}
    )
    caption_column: str = field(default="text", metadata={"help": "Column of the captions."})
    self_correction: bool = field(default=True, metadata={"help": "Draw some of the codes that are seen."})


def encode(row: dict[str, Any], index: int, processor: NextFlowProcessor, data: Data) -> dict[str, Any]:
    """A row of the folder as a coded sample; the draws of self-correction depend on the row alone."""
    messages = [
        {"role": "user", "content": row[data.caption_column]},
        {"role": "assistant", "content": [{"type": "image", "image": row["image"]}]},
    ]
    generator = torch.Generator().manual_seed(index)
    return encode_messages(messages, processor, self_correction=data.self_correction, generator=generator)


def load_samples(data: Data, processor: NextFlowProcessor) -> Dataset:
    """Coded samples, from either source."""
    if (data.pictures is None) == (data.codes is None):
        raise ValueError("Give either `--pictures`, a folder of pictures, or `--codes`, a folder of coded samples.")
    if data.data_list is not None:
        if data.codes is None or len(data.codes) != 1:
            raise ValueError("`--data_list` goes with one folder of `--codes`, in which each source has its own.")
        sources = read_data_list(data.data_list)
        coded = {name: load_coded_dataset(Path(data.codes[0], name)) for name in sources}
        weights = {name: source.weight for name, source in sources.items() if source.weight is not None}
        return mix_coded_datasets(coded, weights or None)
    if data.codes is not None:
        return concatenate_datasets([load_coded_dataset(folder) for folder in data.codes])
    pictures = load_dataset("imagefolder", data_dir=data.pictures, split="train")
    if data.caption_column not in pictures.column_names:
        raise ValueError(
            f'The pictures in "{data.pictures}" have the columns {", ".join(pictures.column_names)}, but captions were '
            f'expected in "{data.caption_column}". Write a metadata.jsonl, or pass `--caption_column`.'
        )
    return pictures.map(
        partial(encode, processor=processor, data=data), with_indices=True, remove_columns=pictures.column_names
    )


def main(arguments: list[str] | None = None) -> NextFlowSFTTrainer:
    data, settings, model_config = TrlParser(
        (Data, NextFlowSFTConfig, ModelConfig), allow_abbrev=False
    ).parse_args_and_config(arguments)
    path = model_config.model_name_or_path or str(tiny_checkpoint())
    processor = NextFlowProcessor.from_pretrained(path)
    model = NextFlowForCausalLM.from_pretrained(
        path,
        revision=model_config.model_revision,
        dtype=model_config.dtype,
        attn_implementation=model_config.attn_implementation,
        quantization_config=get_quantization_config(model_config),
    )
    with settings.main_process_first(desc="encoding"):  # the others find what it encoded
        samples = load_samples(data, processor)
    held_out = {Path(folder).name: load_coded_dataset(folder) for folder in data.eval_codes or ()}
    trainer = NextFlowSFTTrainer(
        model,
        settings,
        train_dataset=samples,
        eval_dataset=held_out or None,
        processing_class=processor,
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)  # "true": the last of `--output_dir`
    if trainer.is_fsdp_enabled:
        # Checkpoints stay in shards, which `save_model` would not gather: it would save nothing.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()  # with processor and image tokenizer
    return trainer


if __name__ == "__main__":
    main()
