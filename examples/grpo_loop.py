"""GRPO with prefix-tuning as a flat loop to read: no trainer, no classes.

    python examples/grpo_loop.py --updates 20
    python examples/grpo_loop.py --updates 20 --scales 8 --alpha 0 --output runs/loop

It trains nextflow-tiny on captions that leave places open ("a red circle and a blue square in random places"), where
the codes of a coarse scale have to agree on a layout, with GenEval's rule as the reward. `NextFlowGRPOTrainer` does the
same with all that a long run needs.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from tiny_world.detector import detect_objects, scene_metadata
from tiny_world.shapes import HARD_KIND, sample_scene
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, ScaleSchedule, tiny_checkpoint
from transformers_nextflow.trainer import detector_reward


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8, help="prompts an update")
    parser.add_argument("--group", type=int, default=8, help="pictures a prompt")
    parser.add_argument("--scales", type=int, default=4, help="scales that are trained, from the first on")
    parser.add_argument("--alpha", type=float, default=0.7, help="exponent of the scale weights")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the rollouts")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder to save the model in")
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)
    path = tiny_checkpoint()
    processor = NextFlowProcessor.from_pretrained(path)
    model = NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = model.config
    schedule = ScaleSchedule(num_scales=config.num_scales)
    if not 1 <= options.scales <= schedule.num_scales:
        parser.error(f"--scales must be between 1 and {schedule.num_scales}")

    # 1. The codes that are trained, and their weights: k_s = 1 / (h * w) ** alpha, normalised to a mean of 1.
    num_trained = schedule.offsets[options.scales]
    grids = schedule.grids[: options.scales]
    weights = torch.tensor([1 / (h * w) ** options.alpha for h, w in grids for _ in range(h * w)])
    weights = weights / weights.mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0)

    for update in range(options.updates):
        start = time.perf_counter()

        # 2. Groups of pictures. Each prompt is read once; its cache is handed to the pictures of its group.
        scenes = [sample_scene(rng, "train", HARD_KIND) for _ in range(options.prompts)]
        prompts = processor([scene.caption for scene in scenes], padding=True, return_tensors="pt")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rollout = model.generate(
                **prompts,
                generation_mode="image",
                num_return_sequences=options.group,
                guidance_scale=options.guidance,
                generator=torch.Generator().manual_seed(options.seed * 100_000 + update),
                return_dict_in_generate=True,
            )
            pictures = [images[0] for images in processor.decode_images(rollout.sequences, rollout.image_grid_shw)]
        drawn = time.perf_counter()

        # 3. Rewards, and advantages: how much better than its group a picture is.
        metadata = [scene_metadata(scene) for scene in scenes for _ in range(options.group)]
        rewards = torch.tensor(detector_reward(pictures, metadata, detector=detect_objects, partial_credit=True))
        groups = rewards.view(options.prompts, options.group)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        advantages = advantages.flatten()[:, None]
        judged = time.perf_counter()

        # 4. Log-probabilities of the first scales, all codes at once, without guidance. A sequence may stop after any
        #    scale; the grid still says how large the whole picture is. The output before a code predicts it.
        last = rollout.sequences.shape[1] - schedule.num_tokens + num_trained
        ids = rollout.sequences[:, :last]
        mask = torch.ones_like(ids)
        prompt_mask = prompts["attention_mask"].repeat_interleave(options.group, 0)
        mask[:, : prompt_mask.shape[1]] = prompt_mask
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(
                ids,
                image_grid_shw=rollout.image_grid_shw,
                attention_mask=mask,
                logits_to_keep=num_trained + 1,
                visual_logits=True,
                use_cache=False,
            ).logits[:, :-1]
        codes = ids[:, -num_trained:] - config.text_vocab_size
        log_probs = logits.float().log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1)

        # 5. The loss. With one update a batch the ratio of new to old probability is 1, but has the gradient.
        ratios = (log_probs - log_probs.detach()).exp()
        clipped = ratios.clamp(0.8, 1.2)
        loss = -(weights * torch.minimum(ratios * advantages, clipped * advantages)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.eval()
        done = time.perf_counter()
        print(
            f"update {update:3d}  reward {rewards.mean():.3f}  all right {(rewards >= 1).float().mean():.3f}  "
            f"gradient {norm:.2f}  seconds: rollout {drawn - start:.1f}, reward {judged - drawn:.1f}, "
            f"update {done - judged:.1f}",
            flush=True,
        )

    if options.output:
        model.save_pretrained(options.output)
        processor.save_pretrained(options.output)


if __name__ == "__main__":
    main()
