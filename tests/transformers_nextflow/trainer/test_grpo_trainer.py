"""GRPO: the loss against a loop, what is trained and what is not, VMR, masks, editing, resuming, two processes."""

import json
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from trl import GRPOConfig, TrlParser

from forks import call_fresh, fork_ranks
from transformers_nextflow import NextFlowForCausalLM, NextFlowProcessor, ScaleSchedule
from transformers_nextflow.trainer import NextFlowGRPOConfig, NextFlowGRPOTrainer, RewardOutput, middle_returns

SCHEDULE = ScaleSchedule(num_scales=5)
PROMPTS = ["red", "a longer prompt", "blue", "green"]
SETTINGS = dict(
    num_trained_scales=3,
    guidance_scale=2.0,
    top_k=20,
    num_generations=4,
    per_device_train_batch_size=8,
    max_steps=2,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    logging_steps=1,
    report_to=[],
    use_cpu=True,
    bf16=False,
    save_strategy="no",
    disable_tqdm=True,
)


def brightness(images, **kwargs):
    return [float(np.asarray(image, np.float64).mean()) for image in images]


@pytest.fixture
def make_trainer(tiny_random_checkpoint, tmp_path):
    def make(reward=brightness, rows=None, **changes) -> NextFlowGRPOTrainer:
        names = ("peft_config", "eval_dataset", "model")
        kwargs = {name: changes.pop(name) for name in names if name in changes}
        rows = rows or [{"prompt": prompt} for prompt in PROMPTS]
        return NextFlowGRPOTrainer(
            kwargs.pop("model", str(tiny_random_checkpoint)),
            reward,
            NextFlowGRPOConfig(str(tmp_path / "run"), **{**SETTINGS, **changes}),
            train_dataset=datasets.Dataset.from_list(rows),
            **kwargs,
        )

    return make


def rows_of(*prompts: str, group: int = 4, **columns) -> list[dict]:
    return [{"prompt": prompt, **columns} for prompt in prompts for _ in range(group)]


def history(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def score(trainer, rows) -> dict:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    return trainer._generate_and_score_completions(rows)


def slow_log_probs(model, processor, prompt: str, codes: torch.Tensor) -> torch.Tensor:
    """Of one sample without padding: each code by the softmax over the visual rows of all logits."""
    offset = model.config.text_vocab_size
    ids = torch.tensor([[*processor.tokenizer(prompt)["input_ids"], model.config.boi_token_id, *(codes + offset)]])
    logits = model(ids, image_grid_shw=torch.tensor([SCHEDULE.grid_shw])).logits[0, :, offset:]
    first = ids.shape[1] - len(codes) - 1
    return torch.stack([logits[first + j].log_softmax(-1)[code] for j, code in enumerate(codes.tolist())])


# --- The loss ---


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_the_loss_and_its_gradient_are_a_loop_written_out(make_trainer, tiny_random_checkpoint, alpha):
    trainer = make_trainer(scale_reweight_alpha=alpha)
    inputs = score(trainer, rows_of("red", "a longer prompt"))
    m, n = 3, SCHEDULE.offsets[3]
    codes = inputs["completion_ids"] - trainer.model.config.text_vocab_size
    assert codes.shape == (8, n)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()

    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.float32)
    norm = sum(1 / (h * w) ** alpha * h * w for h, w in SCHEDULE.grids[:m])
    k = torch.tensor([n / norm / (h * w) ** alpha for h, w in SCHEDULE.grids[:m] for _ in range(h * w)])
    total = 0
    for index in range(8):
        log_probs = slow_log_probs(model, trainer.processing_class, PROMPTS[index // 4], codes[index])
        ratios = (log_probs - log_probs.detach()).exp()
        total = total - (k * ratios * inputs["advantages"][index]).sum() / n / 8
    total.backward()
    assert float(loss) == pytest.approx(float(total), abs=1e-6)
    ours, theirs = dict(trainer.model.named_parameters()), dict(model.named_parameters())
    compared = [name for name in ours if theirs[name].grad is not None]
    assert "lm_head.weight" in compared and "model.connector.0.weight" in compared
    for name in compared:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, atol=1e-6, rtol=1e-4)


def test_finer_scales_take_no_part(make_trainer):
    trainer = make_trainer()
    inputs = score(trainer, rows_of("red"))
    log_probs, entropies = trainer._log_probs(trainer.model, inputs)
    assert log_probs.shape == entropies.shape == inputs["completion_ids"].shape == (4, SCHEDULE.offsets[3])
    assert torch.equal(inputs["weights"][0], inputs["weights"][3])
    everything = score(make_trainer(num_trained_scales=None), rows_of("red"))
    assert everything["completion_ids"].shape == (4, SCHEDULE.num_tokens)
    # The same pictures were drawn: what is trained does not change what is drawn.
    assert torch.equal(everything["completion_ids"][:, : SCHEDULE.offsets[3]], inputs["completion_ids"])
    assert torch.equal(everything["advantages"], inputs["advantages"])


def test_advantages_are_of_the_group_and_constants_change_nothing(make_trainer):
    rows = rows_of("red", "blue")
    inputs = score(make_trainer(), rows)
    shifted = score(make_trainer(lambda images, **kwargs: [r + 1000 for r in brightness(images)]), rows)
    assert torch.equal(inputs["completion_ids"], shifted["completion_ids"])
    torch.testing.assert_close(inputs["advantages"], shifted["advantages"], atol=1e-3, rtol=1e-3)
    assert inputs["advantages"].view(2, 4).mean(1).abs().max() < 1e-4
    assert inputs["advantages"].view(2, 4).std(1).tolist() == pytest.approx([1, 1], abs=1e-2)


def test_ratios_are_one_at_first_and_move_in_later_iterations(make_trainer):
    trainer = make_trainer(num_iterations=2, max_steps=4, learning_rate=1e-2)
    trainer.train()
    ratios = history(trainer, "ratio/max")
    assert ratios[0] == ratios[2] == 1 and ratios[1] > 1 and ratios[3] > 1


def test_old_log_probs_are_those_that_drew_when_updates_come_between(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=4, steps_per_generation=2, max_steps=4, learning_rate=1e-2)
    trainer.train()
    ratios = history(trainer, "ratio/max")
    # The second half of each generation is seen by a model that the first half has changed.
    assert ratios[0] == pytest.approx(1, abs=1e-4) and ratios[1] > 1.001


@pytest.mark.parametrize("lora", [False, True])
def test_the_kl_of_a_policy_with_itself_is_zero(make_trainer, lora):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = make_trainer(beta=0.1, peft_config=config, max_steps=3, learning_rate=1e-2)
    assert (trainer.ref_model is None) == lora
    trainer.train()
    kl = history(trainer, "kl")
    assert kl[0] == 0 and kl[1] > 0


def test_gradient_accumulation_is_one_large_batch(make_trainer):
    large = make_trainer(max_steps=2, shuffle_dataset=False)
    small = make_trainer(
        max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4, shuffle_dataset=False
    )
    large.train()
    small.train()
    assert history(small, "reward") == pytest.approx(history(large, "reward"), rel=1e-4)
    assert history(small, "grad_norm") == pytest.approx(history(large, "grad_norm"), rel=1e-3)


# --- Thoughts ---

THINKING = dict(thinking=True, max_completion_length=4, num_trained_scales=2, guidance_scale=None)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_thoughts_and_first_scales_are_a_loop_written_out(make_trainer, tiny_random_checkpoint, beta):
    """Each row by itself, without padding: its words, that it ends (unless cut off), and its codes."""
    told = []

    def judge(images, thoughts, completion_ids):
        told.extend(zip(thoughts, completion_ids, strict=True))
        return [brightness([image])[0] + 20 * len(text) for image, text in zip(images, thoughts, strict=True)]

    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.float32)
    ends = {model.config.boi_token_id, model.config.eos_token_id}
    rare = [token for token in range(model.config.text_vocab_size) if token not in (*ends, 97, 98, 99, 100)]
    options = {"generation_kwargs": {"suppress_tokens": rare}}  # so that it ends often
    trainer = make_trainer(judge, beta=beta, temperature=0.8, **THINKING, **options)
    with torch.no_grad():  # not where the reference is
        for policy in (trainer.model, model):
            policy.lm_head.weight[:] *= 1.5
    rows = rows_of("red", "a longer prompt")
    inputs = score(trainer, rows)
    config, processor, n = model.config, trainer.processing_class, SCHEDULE.offsets[2]
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()

    reference = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.float32)
    allowed = [i for i in range(config.text_vocab_size) if i not in (config.eoi_token_id, config.image_token_id)]
    norm = sum(1 / (h * w) ** 0.7 * h * w for h, w in SCHEDULE.grids[:2])
    k = [n / norm / (h * w) ** 0.7 for h, w in SCHEDULE.grids[:2] for _ in range(h * w)]

    def log_probs_of(policy, ids: list[int], start: int, length: int) -> torch.Tensor:
        grids = torch.tensor([SCHEDULE.grid_shw])
        logits = policy(torch.tensor([ids]), image_grid_shw=grids).logits[0] / 0.8
        found = []
        for place in range(start, start + length):
            scores = logits[place - 1, allowed].log_softmax(-1)
            found.append(scores[allowed.index(ids[place])])
        if length < 4:
            scores = logits[start + length - 1, allowed].log_softmax(-1)
            found.append(sum(scores[allowed.index(token)].exp() for token in ends).log())
        for place in range(start + length + 1, start + length + 1 + n):
            code = ids[place] - config.text_vocab_size
            found.append(logits[place - 1, config.text_vocab_size :].log_softmax(-1)[code])
        return torch.stack(found)

    total, lengths = 0, set()
    for index, (text, ids) in enumerate(told):
        prompt = [{"role": "user", "content": rows[index]["prompt"]}]
        words = processor.tokenizer(processor.apply_chat_template(prompt, add_generation_prompt=True))["input_ids"]
        length = ids.index(config.boi_token_id)
        assert text == processor.tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
        lengths.add(length)
        whole = [*words, *ids]
        ours = log_probs_of(model, whole, len(words), length)
        weights = torch.tensor([1.0] * (len(ours) - n) + k)
        losses = -(ours - ours.detach()).exp() * inputs["advantages"][index]
        if beta:
            difference = log_probs_of(reference, whole, len(words), length).detach() - ours
            losses = losses + beta * (difference.exp() - difference - 1)
        total = total + (weights * losses).sum() / weights.sum() / 8
    total.backward()
    assert len(lengths) > 1 and 4 in lengths  # some are cut off, some end
    assert float(loss.detach()) == pytest.approx(float(total.detach()), abs=1e-6)
    ours, theirs = dict(trainer.model.named_parameters()), dict(model.named_parameters())
    for name in [name for name in ours if theirs[name].grad is not None]:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, atol=1e-6, rtol=1e-4)


def test_thoughts_and_pictures_learn_together(make_trainer, tmp_path):
    """A reward of both: an even first id of the thought, and an even first code."""
    seen = []

    def both(images, completion_ids, thoughts):
        seen.append([[1 - ids[0] % 2, 1 - ids[-SCHEDULE.num_tokens] % 2] for ids in completion_ids])
        return [word + code for word, code in seen[-1]]

    settings = {**THINKING, "max_completion_length": 1, "num_trained_scales": 1, "num_generations": 8}
    trainer = make_trainer(both, rows=[{"prompt": "red"}] * 4, max_steps=20, learning_rate=3e-2, **settings)
    trainer.train()
    shares = np.array(seen).mean(1)
    assert (shares[:3].mean(0) < 0.7).all() and (shares[-4:].mean(0) > 0.75).all(), shares
    log = trainer.state.log_history[0]
    assert log["thoughts/mean_length"] <= 1 and 0 <= log["thoughts/clipped_ratio"] <= 1


def test_thinking_resumes_and_is_refused_where_it_can_not_be(make_trainer, tmp_path):
    settings = dict(THINKING, max_steps=3, save_strategy="steps", save_steps=1, steps_per_generation=2)
    settings |= dict(per_device_train_batch_size=4)
    whole, resumed = make_trainer(**settings), make_trainer(**settings)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(ValueError, match="each has a thought of its own"):
        make_trainer(**THINKING, middle_return_scale=1)
    for name in ("max_new_tokens", "thinking", "do_sample"):
        with pytest.raises(ValueError, match=f"`generation_kwargs` can't hold `{name}`"):
            make_trainer(**THINKING, generation_kwargs={name: 1})


# --- Training ---


def test_a_reward_is_learnt(make_trainer):
    trainer = make_trainer(
        lambda images, completion_ids: [tokens[0] % 2 for tokens in completion_ids],  # of the first scale's code
        rows=[{"prompt": "red"}] * 4,
        max_steps=16,
        learning_rate=2e-2,
        num_generations=8,
        num_trained_scales=1,
        guidance_scale=1.0,
        top_k=0,
        top_p=1.0,
    )
    trainer.train()
    rewards = history(trainer, "reward")
    assert np.mean(rewards[:3]) < 0.7 and np.mean(rewards[-3:]) > 0.85
    assert {"time/rollout", "time/reward", "time/update"} <= trainer.state.log_history[0].keys()


def test_rollouts_are_drawn_without_dropout_and_with_generation_kwargs(make_trainer):
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.9, init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=lora, generation_kwargs={"image_top_k": 1})
    inputs = score(trainer, rows_of("red"))
    assert trainer.model.training
    batch = trainer.processing_class(["red"], return_tensors="pt")
    expected = trainer.model.eval().generate(**batch, generation_mode="image", do_sample=False, guidance_scale=2.0)
    n = SCHEDULE.offsets[3]
    codes = expected[0, -SCHEDULE.num_tokens :][:n]
    assert (inputs["completion_ids"] == codes).all()


def test_lora_trains_adapters_only(make_trainer, tiny_random_checkpoint, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=lora)
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    trainer.train()
    assert all(torch.equal(dict(trainer.model.named_parameters())[name], value) for name, value in frozen.items())
    trainer.save_model(str(tmp_path / "lora"))
    base = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    adapters = {name: value for name, value in loaded.named_parameters() if "lora_B" in name}
    assert adapters and all((value != 0).any() for value in adapters.values())


def test_a_resumed_run_is_an_unbroken_one(make_trainer, tmp_path):
    settings = dict(
        max_steps=4, save_strategy="steps", save_steps=2, middle_return_scale=2, prefix_updates_per_suffix=2
    )
    settings["rows"] = [{"prompt": prompt} for prompt in [*PROMPTS, "black", "white", "cyan", "pink"]]
    unbroken = make_trainer(**settings)
    unbroken.train()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert history(resumed, "reward") == pytest.approx(history(unbroken, "reward"), rel=1e-5)
    for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_evaluation_and_logged_pictures(make_trainer, tmp_path):
    def brightness_and_logs(images, log_metric, log_extra, **kwargs):
        log_metric("largest", max(brightness(images)))
        log_extra("place", list(range(len(images))))
        return brightness(images)

    trainer = make_trainer(
        brightness_and_logs,
        max_steps=1,
        log_completions=True,
        eval_dataset=datasets.Dataset.from_list([{"prompt": "blue"}]),
        num_generations_eval=1,
        per_device_eval_batch_size=1,
    )
    trainer.train()
    import pandas

    (table,) = (tmp_path / "run" / "completions").glob("completions_00001.parquet")
    logged = pandas.read_parquet(table)
    assert len(logged) == 8 and set(logged["prompt"]) <= set(PROMPTS)
    sizes = [Image.open(file).size for file in logged["image"]]
    assert sizes == [(80, 80)] * 8
    means = [float(np.asarray(Image.open(file), np.float64).mean()) for file in logged["image"]]
    assert means == pytest.approx(logged["brightness_and_logs"].tolist(), abs=1e-3)
    assert logged["place"].tolist() == list(range(8)) and history(trainer, "largest")[0] == pytest.approx(max(means))
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] > 0 and np.isfinite(metrics["eval_loss"])


# --- VMR and masks ---


def count_calls(trainer, rows) -> tuple[list[int], dict]:
    """Rows of each call of the model while pictures are drawn."""
    sizes = []
    hook = trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    inputs = score(trainer, rows)
    hook.remove()
    return sizes, inputs


def test_middle_returns_share_prefixes_and_alternate(make_trainer):
    seen = []

    def reward(images, **kwargs):
        seen.append(brightness(images))
        return [value - 118 for value in seen[-1]]

    trainer = make_trainer(reward, middle_return_scale=2, num_trained_scales=4, num_middle_rollouts=3)
    rows = rows_of("red", "blue")
    sizes, inputs = count_calls(trainer, rows)
    # Both branches of guidance: 2 prompts once, 8 prefixes for one more scale, then 3 pictures of each.
    assert sizes == [4, 16, 48, 48, 48]
    assert inputs["completion_ids"].shape == (8, SCHEDULE.offsets[2])
    values = middle_returns(torch.tensor(seen[0]).view(8, 3) - 118).view(2, 4)
    expected = (values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(inputs["advantages"].view(2, 4), expected, atol=1e-3, rtol=1e-3)

    stages = []
    for step in range(8):
        trainer.state.global_step = step
        stages.append(trainer._stage().scales)
    assert stages == [range(2)] * 3 + [range(2, 4)] + [range(2)] * 3 + [range(2, 4)]
    sizes, inputs = count_calls(trainer, rows)
    # The suffix: one prefix a prompt, from which the four pictures of its group go on.
    assert sizes == [4, 4, 16, 16, 16]
    offset = trainer.model.config.text_vocab_size
    prefixes = inputs["prompt_ids"][:, -SCHEDULE.offsets[2] :].view(2, 4, -1)
    assert (prefixes == prefixes[:, :1]).all() and (prefixes >= offset).all()
    assert inputs["completion_ids"].shape == (8, SCHEDULE.offsets[4] - SCHEDULE.offsets[2])
    # Their log-probabilities are those of whole sequences.
    codes = torch.cat([prefixes.flatten(0, 1), inputs["completion_ids"]], dim=1) - offset
    log_probs = trainer._log_probs(trainer.model, inputs)[0]
    for index in (0, 7):
        whole = slow_log_probs(trainer.model, trainer.processing_class, ["red", "blue"][index // 4], codes[index])
        torch.testing.assert_close(log_probs[index], whole[SCHEDULE.offsets[2] :], atol=1e-5, rtol=1e-4)
    assert trainer._compute_loss(trainer.model, inputs).isfinite()


def test_masks_gate_the_loss_and_ones_change_nothing(make_trainer):
    rows = rows_of("red", "blue")

    def with_masks(masks):
        return lambda images, **kwargs: RewardOutput(brightness(images), masks)

    plain = make_trainer()
    bare = score(plain, rows)
    ones = score(make_trainer(with_masks([np.ones((80, 80), bool)] * 4 + [None] * 4)), rows)
    assert torch.equal(ones["weights"], bare["weights"])
    corner = np.zeros((80, 80), bool)
    corner[:16, :16] = True
    trainer = make_trainer([with_masks([corner] * 8), brightness])
    gated = score(trainer, rows)
    n = SCHEDULE.offsets[3]
    assert (gated["weights"][:, [0, 1, 5]] == bare["weights"][:, [0, 1, 5]]).all()  # the corner's code of each scale
    assert (gated["weights"] > 0).sum() == 8 * 3 and gated["weights"].shape == (8, n)
    loss = trainer._compute_loss(trainer.model, gated)
    by_hand = trainer._compute_loss(trainer.model, {**bare, "weights": gated["weights"], **advantages_of(gated)})
    assert float(loss) == float(by_hand)


def advantages_of(inputs: dict) -> dict:
    return {"advantages": inputs["advantages"]}


def test_a_prefixs_mask_is_the_union_of_its_pictures(make_trainer):
    left, right = np.zeros((2, 80, 80), bool)
    left[:16, :16], right[:16, 64:] = True, True
    reward = lambda images, **kwargs: RewardOutput(brightness(images), [left, right] * (len(images) // 2))  # noqa: E731
    inputs = score(make_trainer(reward, middle_return_scale=2, num_trained_scales=2), rows_of("red"))
    assert (inputs["weights"][0] > 0).tolist() == [True, True, True, False, False]


# --- Prompts ---


def test_prompts_with_images(make_trainer, tiny_random_checkpoint):
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8)) for i in (0, 1)]
    seen = {}

    def reward(images, source_images, prompts):
        seen.update(sources=source_images, prompts=prompts)
        return brightness(images)

    trainer = make_trainer(reward)
    rows = [
        *rows_of("<image>more red", group=4, images=[pictures[0]]),
        *rows_of("nothing", group=2),
        *[{"prompt": [{"role": "user", "content": [{"type": "image", "image": pictures[1]}]}]} for _ in range(2)],
    ]
    trainer.args.num_generations = trainer.num_generations = 4
    with pytest.raises(ValueError, match="has 0 `<image>` marks, but its row has 1 pictures"):
        score(trainer, rows_of("no mark", images=[pictures[0]]))
    inputs = score(trainer, rows[:4] + rows_of("<image>more", images=[pictures[1]]))
    assert seen["sources"] == [[pictures[0]]] * 4 + [[pictures[1]]] * 4
    assert [len(grids) for grids in inputs["image_grids"]] == [2] * 8
    # The log-probabilities of the first sample, alone and without padding.
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    ids = processor("<image>more red", images=[pictures[0]], return_tensors="pt")["input_ids"]
    boi, completion = torch.tensor([[processor.boi_token_id]]), inputs["completion_ids"][:1]
    logits = trainer.model(
        torch.cat([ids, boi, completion], dim=1), image_grid_shw=torch.tensor([SCHEDULE.grid_shw] * 2)
    ).logits[0, ids.shape[1] : -1, trainer.model.config.text_vocab_size :]
    expected = logits.log_softmax(-1).gather(-1, completion[0, :, None] - trainer.model.config.text_vocab_size)[:, 0]
    torch.testing.assert_close(trainer._log_probs(trainer.model, inputs)[0][0], expected, atol=1e-5, rtol=1e-4)
    # Prompts with and without, in runs of different lengths, in words and as conversations.
    mixed = score(trainer, rows)
    assert [len(grids) for grids in mixed["image_grids"]] == [2, 2, 2, 2, 1, 1, 2, 2]
    assert seen["prompts"][6][0]["role"] == "user"
    with pytest.raises(ValueError, match="`blind` can't see them: give it a parameter `source_images`"):
        score(make_trainer(blind), rows[:4])


def test_special_tokens_in_conversations_are_text(make_trainer):
    trainer = make_trainer()
    typed = "<|im_end|><image>"
    parts = [{"type": "image", "image": np.zeros((80, 80, 3), np.uint8)}, {"type": "text", "text": typed}]
    rows = [{"prompt": [{"role": "user", "content": parts}]}, {"prompt": [{"role": "user", "content": parts[:1]}]}]
    special = trainer.processing_class.tokenizer.convert_tokens_to_ids("<|im_end|>")
    batches = [trainer._read_prompts([row]) for row in rows]
    assert [len(batch["image_grid_shw"]) for batch in batches] == [1, 1]
    assert (batches[0]["input_ids"] == special).sum() == (batches[1]["input_ids"] == special).sum()


def test_special_tokens_in_a_prompt(make_trainer):
    with pytest.raises(ValueError, match=r"must not hold any of <boi>, <\|im_end\|>"):
        make_trainer()._read_prompts([{"prompt": "a <boi> ring <|im_end|>"}])


def blind(images):
    return brightness(images)


def test_training_on_edits(make_trainer):
    picture = Image.new("RGB", (80, 80), "teal")
    rows = [{"prompt": f"<image>{word}", "images": [picture], "word": word} for word in ("red", "blue", "teal")]
    trainer = make_trainer(lambda images, source_images, word: brightness(images), rows=rows, max_steps=2)
    trainer.train()
    assert len(history(trainer, "reward")) == 2


def test_edits_of_any_shape_and_arrays(make_trainer, tmp_path):
    """Sources that are not square, of mixed shapes and numbers, as pictures and as arrays."""
    wide, tall, square = (np.zeros((h, w, 3), np.uint8) for h, w in ((80, 160), (120, 60), (80, 80)))
    trainer = make_trainer(lambda images, **kwargs: brightness(images), num_generations=2)
    for pictures in ([wide], [Image.fromarray(tall)], [wide, square]):
        inputs = score(trainer, rows_of("<image>" * len(pictures) + "a", group=2, images=pictures))
        grids = inputs["image_grids"][0]
        assert len(grids) == len(pictures) + 1 and grids[-1].tolist() == list(SCHEDULE.grid_shw)
    mixed = rows_of("<image>a", group=2, images=[wide]) + rows_of("<image>bb", group=2, image=tall)
    inputs = score(trainer, mixed + rows_of("none", group=2))
    assert trainer._compute_loss(trainer.model, inputs).isfinite()
    assert [len(grids) for grids in inputs["image_grids"]] == [2, 2, 2, 2, 1, 1]
    # Equal prompts whose pictures differ are not read as one.
    other = rows_of("<image>a", group=2, images=[wide + 255])
    ids = score(trainer, rows_of("<image>a", group=2, images=[wide]) + other)["prompt_ids"]
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[2], ids[3]) and not torch.equal(ids[0], ids[2])


# --- Rewards that misbehave ---


def test_none_is_left_out_and_counted(make_trainer):
    def sometimes(images, **kwargs):
        return [None if index % 4 == 0 else value for index, value in enumerate(brightness(images))]

    trainer = make_trainer(sometimes, max_steps=1)
    inputs = score(trainer, rows_of("red", "blue"))
    assert inputs["advantages"][[0, 4]].tolist() == [0, 0] and (inputs["advantages"][[1, 5]] != 0).all()
    trainer._metrics["train"].clear()
    trainer.train()
    assert history(trainer, "rewards/sometimes/unscored") == [2]


def test_no_variance_and_no_rewards_train_nothing_and_break_nothing(make_trainer):
    for value in (1.0, None):
        trainer = make_trainer(lambda images, value=value, **kwargs: [value] * len(images), max_steps=1)
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        trainer.train()
        assert history(trainer, "grad_norm") == [0] and history(trainer, "frac_reward_zero_std") == [1]
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def broken(images):
    raise KeyError("no such thing")


def hanging(images):
    threading.Event().wait()


async def far_away(images):
    return brightness(images)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda images: [1.0] * 3, ValueError, "`<lambda>` returned 3 rewards for 8 images"),
        (lambda images: 1.0, ValueError, "returned float rewards for 8 images"),
        (lambda images: [1.0] * 7 + [float("nan")], ValueError, "returned nan for image 7. Rewards must be finite"),
        (lambda images: RewardOutput([1.0] * 8, [None]), ValueError, "returned 1 masks for 8 images"),
        (broken, RuntimeError, "`broken` failed on 8 images: KeyError: 'no such thing'"),
        (hanging, TimeoutError, "`hanging` took longer than 0.5 seconds for 8 images"),
    ],
)
def test_bad_rewards_are_explained(make_trainer, reward, error, message):
    with pytest.raises(error, match=message):
        # What answers has all the time of a busy machine.
        score(make_trainer(reward, reward_timeout=0.5 if reward is hanging else None), rows_of("red", "blue"))


def test_coroutines_and_weights(make_trainer):
    twice = make_trainer([far_away, brightness], reward_weights=[0.5, 1.5])
    rows = rows_of("red", "blue")
    torch.testing.assert_close(
        score(twice, rows)["advantages"], score(make_trainer(), rows)["advantages"], atol=1e-3, rtol=1e-3
    )


# --- Settings ---


def test_trl_parser_reads_it_from_yaml(tmp_path):
    (tmp_path / "grpo.yaml").write_text("output_dir: out\nnum_trained_scales: 4\nmiddle_return_scale: 2\ntop_k: 2\n")
    (config,) = TrlParser(NextFlowGRPOConfig).parse_args_and_config(
        ["--config", str(tmp_path / "grpo.yaml"), "--use_cpu", "true", "--bf16", "false", "--beta", "0.5"]
    )
    assert (config.num_trained_scales, config.middle_return_scale, config.top_k, config.beta) == (4, 2, 2, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_vllm": True}, "`use_vllm` must be False, but got True: vLLM does not draw"),
        ({"loss_type": "dapo"}, "`loss_type` must be 'grpo'"),
        ({"num_generations": 1}, "at least 2 generations"),
        ({"num_trained_scales": 6}, "`num_trained_scales` is 6, but the images have 5 scales. Choose 1 to 5"),
        ({"num_trained_scales": 0}, "`num_trained_scales` must be at least 1"),
        ({"middle_return_scale": 4}, r"at most `num_trained_scales` \(3\)"),
        ({"middle_return_scale": 5, "num_trained_scales": None}, "choose 1 to 4"),
        ({"middle_return_scale": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
          "num_generations": 2, "generation_batch_size": None}, None),
        ({"scale_reweight_alpha": -1}, "`scale_reweight_alpha` must be at least 0"),
        ({"middle_return_temperature": 0}, "`middle_return_temperature` must be positive"),
        ({"temperature": 0}, "`temperature` must be positive"),
        ({"generation_kwargs": {"height": 80, "image_top_k": 3}}, "`generation_kwargs` can't hold `height`: sizes"),
        ({"height": 80}, "`height` and `width` together"),
    ],
)  # fmt: skip
def test_bad_settings_are_explained(make_trainer, settings, message):
    if message is None:
        make_trainer(**settings)
        return
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_prompt_learning_is_refused(make_trainer, tiny_random_checkpoint, config):
    config = config(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="NextFlow's prefix-tuning trains the coarse scales"):
        make_trainer(peft_config=config)
    if isinstance(config, PromptTuningConfig):
        model = get_peft_model(NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint), config)
        with pytest.raises(ValueError, match="NextFlow's prefix-tuning trains the coarse scales"):
            make_trainer(model=model)


def test_other_misuse_is_explained(make_trainer, tiny_random_checkpoint, tmp_path):
    path = str(tiny_random_checkpoint)
    common = dict(train_dataset=datasets.Dataset.from_list([{"prompt": "red"}]))
    with pytest.raises(TypeError, match="must be a `NextFlowGRPOConfig`, but got GRPOConfig"):
        NextFlowGRPOTrainer(path, brightness, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), **common)
    settings = NextFlowGRPOConfig(str(tmp_path), **SETTINGS)
    tokenizer = NextFlowProcessor.from_pretrained(path).tokenizer
    with pytest.raises(ValueError, match="Rewards judge pictures"):
        NextFlowGRPOTrainer(path, brightness, settings, processing_class=tokenizer, **common)
    with pytest.raises(TypeError, match="A reward model over text sees none"):
        NextFlowGRPOTrainer(path, "some/reward-model", settings, **common)
    with pytest.raises(ValueError, match="`reward_funcs` is empty"):
        NextFlowGRPOTrainer(path, [], settings, **common)
    with pytest.raises(ValueError, match="The rows have the columns text, but no `prompt`"):
        NextFlowGRPOTrainer(path, brightness, settings, train_dataset=datasets.Dataset.from_list([{"text": "red"}]))
    with pytest.raises(ValueError, match="`tools` is for text"):
        NextFlowGRPOTrainer(path, brightness, settings, tools=[print], **common)


# --- Processes ---


SPANNING = {"shuffle_dataset": False, "num_generations": 8}


def train_on_two_ranks(checkpoint: str, folder: str) -> None:
    def train():
        trainer = NextFlowGRPOTrainer(
            checkpoint,
            brightness,
            NextFlowGRPOConfig(f"{folder}/run", **{**SETTINGS, **SPANNING, "per_device_train_batch_size": 4}),
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        )
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        if trainer.accelerator.is_main_process:
            Path(folder, "history.json").write_text(json.dumps(trainer.state.log_history))

    fork_ranks(train, folder)


@pytest.mark.slow
def test_a_group_may_span_two_processes(make_trainer, tiny_random_checkpoint, tmp_path):
    alone = make_trainer(**SPANNING)
    alone.train()
    call_fresh(train_on_two_ranks, str(tiny_random_checkpoint), str(tmp_path))
    together = json.loads((tmp_path / "history.json").read_text())
    for name in ("reward", "reward_std", "entropy", "grad_norm"):
        assert [e[name] for e in together if name in e] == pytest.approx(history(alone, name), rel=1e-3), name
