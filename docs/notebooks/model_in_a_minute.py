# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A model in a minute
#
# A model with random weights learns nine pictures by heart in about a minute on a CPU: how pictures become codes,
# what a sample looks like, what to watch while it trains, and that what was trained loads like any other checkpoint.
# [Train your own](../train_your_own.md) is the whole way, in stages, from public parents and public data.

# %%
from pathlib import Path
from tempfile import mkdtemp

import datasets
import diffusers
import matplotlib.pyplot as plt
import torch
import transformers
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from transformers import pipeline

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import NextFlowSFTConfig, NextFlowSFTTrainer, encode_messages

for library in (datasets, diffusers, transformers):
    library.utils.logging.disable_progress_bar()
work = Path(mkdtemp())

# %% [markdown]
# ## The parents
#
# The image tokenizer and the vocabulary are nextflow-tiny's; the language model is new. Five of the tokenizer's eight
# scales make pictures of 80 x 80 pixels, of 55 codes. (`conversion/qwen2_5.py` makes the model from a Qwen2.5.)

# %%
processor = NextFlowProcessor.from_pretrained(tiny_checkpoint())
processor.image_processor.num_scales = 5
torch.manual_seed(0)
config = NextFlowConfig.from_pretrained(tiny_checkpoint(), num_scales=5)
model = NextFlowForCausalLM(config)
print(f"{model.num_parameters() / 1e6:.1f} million parameters, none of them trained")

# %% [markdown]
# ## The data
#
# Nine things, a picture of each. `encode_messages` makes a sample of a conversation: token ids, codes, and which of
# them are learned. (`examples/extract_codes.py` does that for whole data sets, in shards.)

# %%
COLOURS = ("red", "green", "blue")
OUTLINES = {
    "circle": lambda pen, box, colour: pen.ellipse(box, fill=colour),
    "square": lambda pen, box, colour: pen.rectangle(box, fill=colour),
    "ring": lambda pen, box, colour: pen.ellipse(box, outline=colour, width=10),
}
captions = [f"a {colour} {shape}" for colour in COLOURS for shape in OUTLINES]


def draw(caption: str) -> Image.Image:
    _, colour, shape = caption.split()
    picture = Image.new("RGB", (80, 80), "white")
    OUTLINES[shape](ImageDraw.Draw(picture), (14, 14, 66, 66), colour)
    return picture


def sample(caption: str) -> dict:
    asked = {"role": "user", "content": caption}
    answer = {"role": "assistant", "content": [{"type": "image", "image": draw(caption)}]}
    return encode_messages([asked, answer], processor)


pictures = [draw(caption) for caption in captions]
rows = [sample(caption) for caption in captions]
print(rows[0]["image_grid_shw"], len(rows[0]["codes"][0]), "codes:", rows[0]["codes"][0][:14], "...")
print(processor.tokenizer.decode(rows[0]["token_ids"]))
make_image_grid(pictures, rows=1, cols=9)

# %% [markdown]
# What becomes of a picture that is encoded and decoded: no model draws better than its image tokenizer.

# %%
seen = processor(["<image>"] * 9, images=[[picture] for picture in pictures], return_tensors="pt")
ceiling = [picture for (picture,) in processor.decode_images(seen["input_ids"], seen["image_grid_shw"])]
make_image_grid(ceiling, rows=1, cols=9)

# %% [markdown]
# ## Training
#
# Each scale has a loss of its own, and the second is learned last: its four codes see the same thing, the first code
# enlarged, and only their places tell them apart. While that loss stands still, pictures are drawn with their parts in
# the wrong places.

# %%
settings = NextFlowSFTConfig(
    str(work / "model"),
    max_steps=120,
    per_device_train_batch_size=9,
    condition_dropout=0.0,
    learning_rate=2e-3,
    muon_learning_rate=0.02,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    activation_checkpointing=False,
    use_cpu=True,
    bf16=False,
)
trainer = NextFlowSFTTrainer(
    model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=processor
)
trainer.train()
trainer.save_model()

# %%
history = [entry for entry in trainer.state.log_history if "loss_image" in entry]
for scale in range(1, 6):
    losses = [entry[f"loss_scale_{scale}"] for entry in history]
    plt.plot([entry["step"] for entry in history], losses, label=f"scale {scale}")
plt.xlabel("step")
plt.ylabel("cross-entropy (nats a code)")
plt.legend()
plt.show()

# %% [markdown]
# ## What it draws
#
# The folder is a checkpoint like any other, in every door; it knows that it was taught in conversations. No guidance:
# prompts were never left out in this training (`condition_dropout`).

# %%
pipe = NextFlowPipeline.from_pretrained(work / "model")
pipe.set_progress_bar_config(disable=True)
seeds = [torch.Generator().manual_seed(seed) for seed in range(9)]
drawn = pipe(captions, guidance_scale=1.0, generator=seeds).images
make_image_grid(drawn, rows=1, cols=9)

# %%
chat = pipeline("any-to-any", model=str(work / "model"))
messages = [{"role": "user", "content": [{"type": "text", "text": "a blue ring"}]}]
answer = chat(messages, generation_mode="image", generate_kwargs={"guidance_scale": 1.0})
answer[0]["generated_image"]
