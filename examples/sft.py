"""Fine-tunes a NextFlow checkpoint on a folder of pictures with captions, whole or with LoRA.

    python examples/sft.py --pictures FOLDER --output_dir runs/sft --max_steps 200 --learning_rate 1e-4
    python examples/sft.py --config sft.yaml --use_peft true --lora_target_modules q_proj v_proj up_proj

FOLDER is an "imagefolder" of the library datasets: pictures and a `metadata.jsonl` with lines such as
`{"file_name": "0001.png", "text": "a teal hexagon"}`. Pictures are encoded once; datasets keeps the codes. Every field
of `NextFlowSFTConfig` and of TRL's `ModelConfig` is an option, on the command line or in the YAML file. On a CPU add
`--use_cpu true --bf16 false`.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from datasets import load_dataset
from trl import ModelConfig, TrlParser, get_peft_config

from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer, encode_messages


@dataclass
class Data:
    """What is trained on."""

    pictures: str = field(metadata={"help": "Folder of pictures with a metadata.jsonl."})
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


def main(arguments: list[str] | None = None) -> NextFlowSFTTrainer:
    data, settings, model_config = TrlParser((Data, NextFlowSFTConfig, ModelConfig)).parse_args_and_config(arguments)
    path = model_config.model_name_or_path or str(tiny_checkpoint())
    processor = NextFlowProcessor.from_pretrained(path)
    pictures = load_dataset("imagefolder", data_dir=data.pictures, split="train")
    if data.caption_column not in pictures.column_names:
        raise ValueError(
            f'The pictures in "{data.pictures}" have the columns {", ".join(pictures.column_names)}, but captions were '
            f'expected in "{data.caption_column}". Write a metadata.jsonl, or pass `--caption_column`.'
        )
    dataset = pictures.map(
        partial(encode, processor=processor, data=data), with_indices=True, remove_columns=pictures.column_names
    )
    trainer = NextFlowSFTTrainer(
        NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32),
        settings,
        train_dataset=dataset,
        processing_class=processor.tokenizer,
        peft_config=get_peft_config(model_config),
    )
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    trainer.save_model()
    if not model_config.use_peft:
        processor.save_pretrained(settings.output_dir)
    return trainer


if __name__ == "__main__":
    main()
