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
# # A tour
#
# One model that draws, edits, reads, tells stories and talks, on nextflow-tiny, which ships with the package: 128 x 128
# pixels, a few seconds a cell on a CPU. The pictures are whatever the seed gave; none was selected. This page is
# `docs/notebooks/tour.py`: open it in Jupyter through jupytext, or run it with `python`.

# %%
import diffusers
import torch
import transformers
from diffusers.utils import make_image_grid
from PIL import Image
from transformers import pipeline

from diffusers_nextflow import NextFlowPipeline
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, NextFlowSession, tiny_checkpoint

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
pipe = NextFlowPipeline.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def row(images):
    return make_image_grid(images, rows=1, cols=len(images))


# %% [markdown]
# ## Draw
#
# A seed for each picture, so that it does not depend on the batch that it is drawn in.

# %%
prompts = ["a red circle left of a blue square", "two green stars", "a large purple heart on a mint background"]
row(pipe(prompts, guidance_scale=5.0, generator=seeds(3)).images)

# %% [markdown]
# ## Scale by scale
#
# A picture is made in 8 forward passes here (18 at 1024 x 1024), each a finer grid. What is known after a pass is a
# preview.

# %%
previews = []


def show(pipe, step, timestep, tensors):
    previews.append(pipe.decode_latents(tensors["latents"])[0])
    return {}


pipe(prompts[0], generator=seeds(1), callback_on_step_end=show, callback_on_step_end_tensor_inputs=["latents"])
row(previews)

# %% [markdown]
# ## Edit
#
# The same call, with a picture before the prompt. The first two are the sources. (nextflow-tiny recolours the right
# thing less than half of the time.)

# %%
sources = pipe(["a red circle", "a green star"], generator=seeds(2)).images
edited = pipe(["make the circle blue", "move the star down"], image=sources, generator=seeds(2)).images
row([*sources, *edited])

# %% [markdown]
# ## Keep a part
#
# White in the mask is drawn anew, black stays. No training is behind it: the codes that stay are fixed at every scale.

# %%
pair = pipe(prompts[0], generator=seeds(1)).images[0]
mask = Image.new("L", pair.size, 0)
mask.paste(255, (64, 0, 128, 128))
row([pair, mask.convert("RGB"), pipe("a red circle left of a black cross", image=pair, mask_image=mask).images[0]])

# %% [markdown]
# ## Read

# %%
read = pipeline("image-text-to-text", model=tiny_checkpoint())
for question in ("What do you see?", "What colour is the circle?", "How many things are there?"):
    chat = [{"role": "user", "content": [{"type": "image", "image": pair}, {"type": "text", "text": question}]}]
    print(question, read(text=chat, max_new_tokens=16, return_full_text=False)[0]["generated_text"])

# %% [markdown]
# ## Tell a story
#
# Pictures in a row, each drawn with those before in sight.

# %%
row(pipe("A story in three pictures: a red circle moves right.", num_frames=3, generator=seeds(1)).frames[0])

# %% [markdown]
# ## Think, then draw

# %%
output = pipe("two more than one blue star", thinking=True, generator=seeds(1))
print(output.thoughts[0])
output.images[0]

# %% [markdown]
# ## Talk
#
# A session keeps the cache over turns: nothing is read twice.

# %%
path = tiny_checkpoint()
session = NextFlowSession(
    NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32),
    NextFlowProcessor.from_pretrained(path),
    guidance_scale=3.0,
)
turns = [session.draw("a blue star on a gray background", generator=seeds(1)), session.draw("make the blue star red")]
print("What colour is the star?", session.ask("What colour is the star?"))
row(turns)
