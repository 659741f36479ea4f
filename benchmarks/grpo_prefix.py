"""What prefix-tuning, scale reweighting and middle returns bring: GRPO on the hard set of the tiny world.

    python benchmarks/grpo_prefix.py --output runs/grpo_prefix
    python benchmarks/grpo_prefix.py --output runs/grpo_prefix --seeds 0 1 2 --jobs 2 --plot curves.png

Captions leave two places open ("a red circle and a blue square in random places"), and codes of one scale are drawn
independently, so nothing makes them agree on a layout: one place gets two things and another none. Five ways of GRPO,
same number of updates, on the same prompts:

- vanilla: all scales in the loss, all codes weigh alike
- reweighted: all scales, code weights 1 / (h * w) ** 0.7
- prefix: the first scales only, reweighted
- prefix, VMR: the same, with as many prefixes, the value of each from two pictures
- prefix, VMR, half the prefixes: no more pictures than the others draw

The reward is half for the right number of things in the right colours, half for their shapes, by a quick detector; what
is reported is another detector's verdict on prompts that nothing was trained on. All weights of the layers are trained
with plain SGD: Adam's steps are as large where nothing is known as where much is, and of a policy gradient little is
known. Each run is a process; one whose result is in the folder is not repeated, and one that was cut off goes on from
its last checkpoint.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from scipy import ndimage
from transformers.trainer_utils import get_last_checkpoint

from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, NextFlowProcessor, tiny_checkpoint
from transformers_nextflow.trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from tiny_world.detector import detect_objects, scene_metadata
from tiny_world.judge import Verdict, find_background, judge_scene
from tiny_world.shapes import BACKGROUNDS, HARD_KIND, KINDS, Scene, render, sample_scene

VARIANTS: dict[str, dict] = {
    "vanilla": {"num_trained_scales": None, "scale_reweight_alpha": 0.0},
    "reweighted": {"num_trained_scales": None, "scale_reweight_alpha": 0.7},
    "prefix": {"num_trained_scales": 3, "scale_reweight_alpha": 0.7},
    "prefix, VMR": {"num_trained_scales": 3, "scale_reweight_alpha": 0.7, "middle_return_scale": 2},
    "prefix, VMR, half the prefixes": {"num_trained_scales": 3, "scale_reweight_alpha": 0.7, "middle_return_scale": 2},
}
HALVED = "prefix, VMR, half the prefixes"
GROUP = 8
TEST_SEED = 77


def held_out_scenes(hard: int, easy: int) -> dict[str, list[Scene]]:
    """Scenes whose content nothing was trained on: the hard set, and all other kinds in turn."""
    rng = np.random.default_rng(TEST_SEED)
    kinds = [kind for kind in KINDS if kind != HARD_KIND]
    return {
        "hard": [sample_scene(rng, "hard") for _ in range(hard)],
        "easy": [sample_scene(rng, "test", kinds[index % len(kinds)]) for index in range(easy)],
    }


@torch.no_grad()
def draw(
    model, processor: NextFlowProcessor, captions: list[str], seed: int, how: dict, batch_size: int = 40
) -> list[np.ndarray]:
    pictures: list[np.ndarray] = []
    for start in range(0, len(captions), batch_size):
        batch = processor(captions[start : start + batch_size], padding=True, return_tensors="pt")
        settings = {"generator": torch.Generator().manual_seed(seed + start), **how, "return_dict_in_generate": True}
        with torch.autocast("cpu", torch.bfloat16):
            output = model.generate(**batch, generation_mode="image", **settings)
        drawn = processor.decode_images(output.sequences, output.image_grid_shw)
        pictures += [np.asarray(images[0]) for images in drawn]
    return pictures


def background_psnr(picture: np.ndarray, scene: Scene) -> float:
    """PSNR in dB of what lies well outside all ink, against the background's true colour."""
    ink = np.linalg.norm(picture.astype(np.float32) - find_background(picture), axis=-1) > 34
    empty = ~ndimage.binary_dilation(ink, iterations=4)
    error = picture[empty].astype(np.float32) - np.float32(BACKGROUNDS[scene.background])
    return float(10 * np.log10(255**2 / max(np.square(error).mean(), 1e-2))) if empty.any() else 0.0


def has_layout(verdict: Verdict, scene: Scene) -> bool:
    """Whether the judge finds as many pieces as the caption names, in its colours, whatever their shapes."""
    found = sorted(detection.colour for detection in verdict.detections)
    return found == sorted(thing.colour for thing in scene.objects)


def evaluate(
    model, processor: NextFlowProcessor, scenes: dict[str, list[Scene]], seed: int, sheet: Path, how: dict
) -> dict:
    """Accuracy by set, and the first 20 pictures of the hard set as a file. `how` is what `generate` gets."""
    figures = {}
    for name, group in scenes.items():
        pictures = draw(model, processor, [scene.caption for scene in group], seed, how)
        verdicts = [judge_scene(picture, scene) for picture, scene in zip(pictures, group, strict=True)]
        figures[f"{name} accuracy"] = float(np.mean([verdict.correct for verdict in verdicts]))
        figures[f"{name} strict"] = float(np.mean([verdict.strict for verdict in verdicts]))
        figures[f"{name} layout"] = float(np.mean([has_layout(*pair) for pair in zip(verdicts, group, strict=True)]))
        pairs = zip(pictures, group, strict=True)
        figures[f"{name} background PSNR"] = float(np.mean([background_psnr(*pair) for pair in pairs]))
        metadata = [scene_metadata(scene) for scene in group]
        figures[f"{name} reward"] = float(np.mean(layout_reward(pictures, metadata)))
        if name == "hard":
            save_sheet(pictures[:20], sheet)
    return figures


def save_sheet(pictures: list[np.ndarray], path: Path, columns: int = 10):
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (132 * columns, 132 * rows), "gray")
    for index, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (132 * (index % columns) + 2, 132 * (index // columns) + 2))
    sheet.save(path)


def sampling(options: argparse.Namespace) -> dict:
    """How pictures are drawn, in rollouts and for the judge alike, as `generate` takes it.

    Strong guidance sharpens each place for itself: with free places it draws a thing in every quarter, whatever top-p
    is. Then all pictures of a group fail in the same way, and there is nothing to learn from. The layout is decided in
    the first scales (`--top-k`), so the finer ones need not be drawn at random.
    """
    num_scales = NextFlowConfig.from_pretrained(options.checkpoint).num_scales
    top_k = [*options.top_k, *[1] * (num_scales - len(options.top_k))]
    return {"image_top_k": top_k, "image_top_p": options.top_p, "guidance_scale": options.guidance_scale}


def layout_reward(images: list, metadata: list[str | dict]) -> list[float]:
    """Half for as many things as the caption names, in its colours, and half for their shapes as well."""
    rewards = []
    for image, text in zip(images, metadata, strict=True):
        wanted = (json.loads(text) if isinstance(text, str) else text)["include"]
        named = [(item["class"], item["color"]) for item in wanted if "color" in item for _ in range(item["count"])]
        found = [(thing.name, thing.colour) for thing in detect_objects(image) if "object" not in thing.name]
        has_colours = sorted(colour for _, colour in found) == sorted(colour for _, colour in named)
        rewards.append(0.5 * has_colours + 0.5 * (sorted(found) == sorted(named)))
    return rewards


def make_trainer(variant: str, seed: int, options: argparse.Namespace, folder: Path) -> NextFlowGRPOTrainer:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, "train", HARD_KIND) for _ in range(1000)]
    settings = VARIANTS[variant]
    config = NextFlowGRPOConfig(
        str(folder),
        num_generations=GROUP,
        per_device_train_batch_size=options.pictures // (2 if variant == HALVED else 1),
        max_steps=options.updates,
        learning_rate=options.learning_rate,
        optim="sgd",
        max_grad_norm=0.0,  # plain SGD: no clipping
        lr_scheduler_type="constant",
        top_p=options.top_p,
        guidance_scale=options.guidance_scale,
        generation_kwargs={"image_top_k": sampling(options)["image_top_k"]},
        seed=seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=10,
        save_total_limit=1,
        report_to=[],
        use_cpu=True,
        bf16=True,
        activation_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    path = str(options.checkpoint)
    model = NextFlowForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)
    return NextFlowGRPOTrainer(
        model,
        layout_reward,
        config,
        train_dataset=Dataset.from_list(
            [{"prompt": scene.caption, "metadata": json.dumps(scene_metadata(scene))} for scene in scenes]
        ),
        processing_class=NextFlowProcessor.from_pretrained(path),
    )


def run(variant: str, seed: int, options: argparse.Namespace, folder: Path) -> dict:
    """Trains one variant and evaluates it."""
    scenes = held_out_scenes(options.hard, options.easy)
    if variant == "base":
        model = NextFlowForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
        processor = NextFlowProcessor.from_pretrained(options.checkpoint)
        return evaluate(model, processor, scenes, seed, folder / "sheet.png", sampling(options))
    trainer = make_trainer(variant, seed, options, folder)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    names = ("reward", "entropy", "time/rollout", "time/reward", "time/update")
    curves = {name: [float(entry[name]) for entry in logs] for name in names}
    figures = evaluate(
        trainer.model.eval(), trainer.processing_class, scenes, seed, folder / "sheet.png", sampling(options)
    )
    seconds = sum(sum(curves[name]) for name in names if name.startswith("time/"))
    return {"seconds": seconds, **curves, **figures}


def rollout_speed(options: argparse.Namespace, runs: int = 3) -> str:
    """Pictures a second of the trainer's rollouts, and of `generate` alone on the same prompts; medians."""
    trainer = make_trainer("prefix", 0, options, options.output)
    rows = [trainer.train_dataset[index // GROUP] for index in range(options.pictures)]
    model, processor = trainer.model, trainer.processing_class
    prompts = [row["prompt"] for row in rows[::GROUP]]
    seconds: dict[str, list[float]] = {"generate": [], "rollouts": []}
    for _ in range(runs):
        start = time.perf_counter()
        batch = processor(prompts, padding=True, return_tensors="pt")
        with torch.no_grad(), trainer.accelerator.autocast():
            settings = {"num_return_sequences": GROUP, **sampling(options)}
            model.generate(**batch, generation_mode="image", **settings)
        between = time.perf_counter()
        trainer._roll_out(rows, trainer._stage())
        seconds["generate"].append(between - start)
        seconds["rollouts"].append(time.perf_counter() - between)
    speeds = {name: options.pictures / statistics.median(values) for name, values in seconds.items()}
    ratio = speeds["rollouts"] / speeds["generate"]
    return f"pictures a second, batch of {options.pictures}: {json.dumps(speeds)}, rollouts / generate {ratio:.2f}"


@torch.no_grad()
def ceiling(options: argparse.Namespace) -> dict:
    """The same figures on the image tokenizer's reconstructions of true pictures."""
    processor = NextFlowProcessor.from_pretrained(options.checkpoint)
    figures = {}
    for name, scenes in held_out_scenes(options.hard, options.easy).items():
        batch = processor(["<image>"] * len(scenes), images=[[render(s)] for s in scenes], return_tensors="pt")
        decoded = processor.decode_images(batch["input_ids"], batch["image_grid_shw"])
        pictures = [np.asarray(images[0]) for images in decoded]
        verdicts = [judge_scene(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        figures[f"{name} accuracy"] = float(np.mean([verdict.correct for verdict in verdicts]))
        figures[f"{name} strict"] = float(np.mean([verdict.strict for verdict in verdicts]))
        figures[f"{name} layout"] = float(np.mean([has_layout(*pair) for pair in zip(verdicts, scenes, strict=True)]))
        pairs = zip(pictures, scenes, strict=True)
        figures[f"{name} background PSNR"] = float(np.mean([background_psnr(*pair) for pair in pairs]))
    return figures


def plot(results: dict[str, dict[int, dict]], path: Path):
    """Reward of the rollouts, averaged over seeds and five updates; the band is the spread of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for variant, runs in results.items():
        if not runs or variant not in VARIANTS:
            continue
        rewards = np.array([result["reward"] for result in runs.values()])
        window = min(5, rewards.shape[1])
        curves = np.array([np.convolve(row, np.ones(window) / window, "valid") for row in rewards])
        updates = np.arange(curves.shape[1]) + window
        (line,) = axes.plot(updates, curves.mean(0), label=variant)
        axes.fill_between(updates, curves.min(0), curves.max(0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="update", ylabel="reward of the rollouts (mean of 5 updates)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(results: dict[str, dict[int, dict]]) -> str:
    names = ("hard accuracy", "hard strict", "hard layout", "hard reward", "hard background PSNR", "easy accuracy")
    lines = ["| variant | " + " | ".join(names) + " | seconds | seeds |", "|---" + "|---:" * (len(names) + 2) + "|"]
    for variant, runs in results.items():
        if not runs:
            continue
        cells = []
        for name in names:
            values = [result[name] for result in runs.values() if name in result]
            spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        seconds = [result["seconds"] for result in runs.values() if "seconds" in result]
        cells.append(f"{np.mean(seconds):.0f}" if seconds else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + f" | {len(runs)} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("runs/grpo_prefix"), help="folder of the results")
    parser.add_argument("--checkpoint", default=str(tiny_checkpoint()), help="folder (default: nextflow-tiny)")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--pictures", type=int, default=64, help="for one update (VMR: its prefixes)")
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="of rollouts and of judged pictures")
    parser.add_argument("--top-k", type=int, nargs="+", default=[32, 32, 32], help="of the first scales; then 1")
    parser.add_argument("--top-p", type=float, default=1.0, help="of both, too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--hard", type=int, default=80, help="held-out prompts of the hard set")
    parser.add_argument("--easy", type=int, default=40, help="held-out prompts of the other kinds")
    parser.add_argument("--plot", type=Path, help="reward curves, as a picture")
    parser.add_argument("--rollout-speed", action="store_true", help="only compare rollouts with `generate` alone")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each as wide as OMP_NUM_THREADS says")
    parser.add_argument("--run", nargs=2, metavar=("VARIANT", "SEED"), help="run only this one, here")
    return parser


def main():
    options = make_parser().parse_args()
    if options.rollout_speed:
        print(rollout_speed(options))
        return

    names = ("checkpoint", "updates", "pictures", "learning_rate", "guidance_scale", "top_k", "top_p", "hard", "easy")
    settings = {name: getattr(options, name) for name in names}

    def folder_of(variant: str, seed: int) -> Path:
        return options.output / f"{variant.replace(', ', '_')}_{seed}"

    if options.run:
        variant, seed = options.run[0], int(options.run[1])
        folder = folder_of(variant, seed)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(variant, seed, options, folder)
        (folder / "result.json").write_text(json.dumps({**result, "settings": settings}))
        return
    results: dict[str, dict[int, dict]] = {"base": {}, **{variant: {} for variant in options.variants}}

    def finished(variant: str, seed: int) -> dict:
        file = folder_of(variant, seed) / "result.json"
        if not file.exists():
            done = subprocess.run([sys.executable, *sys.argv, "--run", variant, str(seed)])
            if done.returncode:
                raise SystemExit(f"The run of {variant!r} with seed {seed} failed.")
        result = json.loads(file.read_text())
        if result.pop("settings", None) != settings:
            raise SystemExit(f"{file} is of other settings than {settings}. Choose another --output, or delete it.")
        return result

    with ThreadPoolExecutor(options.jobs) as pool:
        order = [(variant, seed) for seed in options.seeds for variant in results]
        for (variant, seed), result in zip(order, pool.map(lambda pair: finished(*pair), order), strict=True):
            results[variant][seed] = result
            print(variant, seed, {k: v for k, v in result.items() if not isinstance(v, list)}, flush=True)
    results["reconstructions"] = {0: ceiling(options)}
    print(table(results))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
