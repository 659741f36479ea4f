"""Trains nextflow-tiny's language model on codes: text to image, with captions as its only text.

The recipe: Muon for the matrices of the blocks and AdamW for the rest; coarse scales first, then all; scale
reweighting; self-corrected inputs; dropped conditions for guidance.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from transformers_nextflow import NextFlowConfig, NextFlowForCausalLM, NextFlowImageTokenizer, ScaleSchedule
from transformers_nextflow.token_layout import TokenLayout

from . import training_state
from .codes import Codes
from .training_state import load_state, save_state

SCHEDULE = ScaleSchedule.from_size(128, 128)
PEAK_MUON, PEAK_ADAM, WARM_UP_STEPS = 0.02, 2e-3, 100
# (until this share of the time, first scales, batch size): coarse scales decide the layout and cost a quarter.
CURRICULUM = ((0.3, 5, 96), (0.45, 7, 64), (1.0, 8, 48))
# Shapes are learned first; from here on the batches lean on what takes longer.
LATE_FROM, LATE_MIXTURE = 0.74, {"shapes": 0.25, "emoji": 0.5, "words": 0.25}
DROP_CAPTION, USE_CHAT, USE_CORRECTED = 0.1, 0.1, 0.6
TEXT_WEIGHT = 0.3
# Until here the loss of an image code runs over the visual rows of the head alone; then over the whole vocabulary.
FULL_VOCABULARY_FROM = 0.9


def tiny_config(text_tokenizer: PreTrainedTokenizerBase, image_tokenizer: NextFlowImageTokenizer) -> NextFlowConfig:
    """nextflow-tiny's language model: the 7B's code path at 8 million parameters."""
    num_text, num_codes = len(text_tokenizer), image_tokenizer.config.codebook_size
    return NextFlowConfig(
        vocab_size=num_text + num_codes,
        text_vocab_size=num_text,
        visual_codebook_size=num_codes,
        visual_code_dim=image_tokenizer.config.code_dim,
        num_scales=SCHEDULE.num_scales,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        scale_reweight_alpha=0.5,
        boi_token_id=text_tokenizer.convert_tokens_to_ids("<boi>"),
        eoi_token_id=text_tokenizer.convert_tokens_to_ids("<eoi>"),
        image_token_id=text_tokenizer.convert_tokens_to_ids("<image>"),
        bos_token_id=None,
        eos_token_id=text_tokenizer.eos_token_id,
        pad_token_id=text_tokenizer.pad_token_id,
    )


@torch.no_grad()
def new_model(config: NextFlowConfig, image_tokenizer: NextFlowImageTokenizer) -> NextFlowForCausalLM:
    """A fresh model whose visual codebook starts as the image tokenizer's."""
    model = NextFlowForCausalLM(config)
    model.model.visual_codebook.weight.copy_(image_tokenizer.quantizer.codebook())
    return model


@dataclass(frozen=True)
class Batch:
    """Right-padded rows; `labels` are -100 where nothing is to be predicted."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    image_grid_shw: torch.Tensor
    task: str = "captions"


class Batches:
    """Draws batches of captions and codes, rows of similar length together."""

    def __init__(self, codes: Codes, text_tokenizer: PreTrainedTokenizerBase, config: NextFlowConfig):
        self.codes, self.config = codes, config
        self.pad = text_tokenizer.pad_token_id
        families = np.array(codes.families)
        self.members = {family: np.flatnonzero(families == family) for family in sorted(set(codes.families))}
        self.plain = text_tokenizer(codes.captions, add_special_tokens=False)["input_ids"]
        head, tail = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
        self.chat_head, self.chat_tail = (text_tokenizer.encode(t, add_special_tokens=False) for t in (head, tail))

    def draw(
        self,
        rng: np.random.Generator,
        batch_size: int,
        num_scales: int,
        mixture: dict[str, float] | None = None,
    ) -> Batch:
        """One batch with the first `num_scales` scales of every image; `mixture` weighs the families anew."""
        # Of a few candidates' windows sorted by caption length, take one: little padding, and still random.
        candidates = self._candidates(rng, 8 * batch_size, mixture)
        order = candidates[np.argsort([len(self.plain[i]) for i in candidates], kind="stable")]
        start = int(rng.integers(0, 8)) * batch_size
        chosen = order[start : start + batch_size]
        num_codes, offset = SCHEDULE.offsets[num_scales], self.config.text_vocab_size
        chat = rng.random() < USE_CHAT
        rows, targets = [], []
        for index in chosen:
            text = list(self.plain[index])
            if rng.random() < DROP_CAPTION:
                text = []
            elif chat:
                text = [*self.chat_head, *text, *self.chat_tail]
            if rng.random() < USE_CORRECTED:
                seen, wanted = self.codes.corrected[index], self.codes.targets[index]
            else:
                seen = wanted = self.codes.clean[index]
            text.append(self.config.boi_token_id)
            seen, wanted = ((codes[:num_codes].astype(np.int64) + offset).tolist() for codes in (seen, wanted))
            rows.append([*text, *seen])
            targets.append([-100, *text[1:], *wanted])  # the first token is never predicted
        length = max(map(len, rows))
        return Batch(
            input_ids=torch.tensor([row + [self.pad] * (length - len(row)) for row in rows]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
            labels=torch.tensor([row + [-100] * (length - len(row)) for row in targets]),
            image_grid_shw=torch.tensor([SCHEDULE.grid_shw] * len(rows)),
        )

    def _candidates(self, rng: np.random.Generator, count: int, mixture: dict[str, float] | None) -> np.ndarray:
        if mixture is None:
            return rng.integers(0, len(self.plain), count)
        present = [family for family in self.members if family in mixture]
        weights = np.array([mixture[family] for family in present])
        counts = rng.multinomial(count, weights / weights.sum())
        return np.concatenate([rng.choice(self.members[f], n) for f, n in zip(present, counts, strict=True)])


def batch_loss(
    model: NextFlowForCausalLM,
    batch: Batch,
    whole_vocabulary: bool,
    text_weight: float = TEXT_WEIGHT,
    alpha: float | None = None,
) -> tuple[torch.Tensor, float, float]:
    """Loss of a batch, and the plain mean cross-entropies of text and of image codes for the log.

    `alpha` is the model's own by default.
    """
    config = model.config
    alpha = float(config.scale_reweight_alpha) if alpha is None else alpha
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            image_grid_shw=batch.image_grid_shw,
            use_cache=False,
        ).last_hidden_state[:, :-1]
        targets = batch.labels[:, 1:]
        is_code, is_text = targets >= config.text_vocab_size, (targets >= 0) & (targets < config.text_vocab_size)
        if whole_vocabulary:
            code_logits, wanted = model.lm_head(hidden[is_code]), targets[is_code]
        else:
            code_logits = F.linear(hidden[is_code], model.lm_head.weight[config.text_vocab_size :])
            wanted = targets[is_code] - config.text_vocab_size
        text_logits = model.lm_head(hidden[is_text])
    layout = TokenLayout.of(batch.input_ids, batch.image_grid_shw, config, batch.attention_mask)
    weights = layout.loss_weights(alpha)
    code_losses = F.cross_entropy(code_logits.float(), wanted, reduction="none")
    text_loss = F.cross_entropy(text_logits.float(), targets[is_text], reduction="sum") / max(1, int(is_text.sum()))
    num_codes = max(1, len(code_losses))
    loss = (code_losses * weights[:, 1:][is_code]).sum() / num_codes + text_weight * text_loss
    return loss, text_loss.item(), code_losses.sum().item() / num_codes


def make_optimizers(model: NextFlowForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, connector, head and vectors."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (".layers." in n and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=PEAK_MUON, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=PEAK_ADAM, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm-up, constant, then linear to almost zero over the last 40 % of the time."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.01, (1 - progress) / 0.4))


def train(
    model: NextFlowForCausalLM,
    batches: Batches,
    folder: Path,
    seconds: float,
    seed: int = 0,
) -> NextFlowForCausalLM:
    """Trains within a wall-clock budget; picks up where a killed run stopped. `folder / "final"` is the result."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "final" / "model.safetensors").exists():
        print("[language model] is done already", flush=True)
        return NextFlowForCausalLM.from_pretrained(folder / "final").eval()
    model.train()
    model.set_attn_implementation("eager")  # for 220 slots with a mask a third faster than CPU's SDPA, as measured
    optimizers = make_optimizers(model)
    state_file = folder / "state.pt"
    step, spent = load_state(state_file, model, optimizers)
    rng = np.random.default_rng((seed, step))
    last = saved = training_state.clock()
    log = np.zeros(3)
    while spent < seconds:
        progress = spent / seconds
        factor = learning_rate_factor(step, progress)
        for optimizer, peak in zip(optimizers, (PEAK_MUON, PEAK_ADAM), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        _, num_scales, batch_size = next(stage for stage in CURRICULUM if progress < stage[0])
        batch = batches.draw(rng, batch_size, num_scales, LATE_MIXTURE if progress >= LATE_FROM else None)
        loss, text_loss, code_loss = batch_loss(model, batch, progress > FULL_VOCABULARY_FROM)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        log += (loss.item(), text_loss, code_loss)
        now = training_state.clock()
        spent, last = spent + now - last, now
        if step % 50 == 0:
            loss_mean, text_mean, code_mean = log / 50
            log[:] = 0
            print(
                f"[language model] step {step} {spent:.0f}/{seconds:.0f} s scales {num_scales} "
                f"loss {loss_mean:.3f} text {text_mean:.3f} codes {code_mean:.3f}",
                flush=True,
            )
        if now - saved > training_state.SAVE_EVERY:
            saved = now
            save_state(state_file, model, optimizers, step, spent)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder / "final")
    state_file.unlink(missing_ok=True)
    return model.eval()
