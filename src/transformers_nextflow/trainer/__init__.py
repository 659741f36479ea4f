"""Training: conversations with pictures as codes, their collation and packing; on TRL supervised fine-tuning and GRPO.

Every name is loaded when it is first used; nothing below imports this package.
"""

import importlib

# The public names of each module: the only list of them.
_MODULES = {
    ".checkpoints": "find_last_checkpoint",
    ".coded_dataset": "coded_features drop_condition encode_conversations encode_messages expand_sample invert_task "
    "load_coded_dataset",
    "..codebook": "hash_image_tokenizer",
    ".data_list": "DataSource mix_coded_datasets read_data_list",
    ".data_collator": "NextFlowDataCollator",
    ".dpo_config": "NextFlowDPOConfig",
    ".dpo_trainer": "NextFlowDPOTrainer encode_preference",
    ".grpo_config": "NextFlowGRPOConfig",
    ".grpo_losses": "code_log_probs group_advantages middle_returns policy_loss propagate_mask",
    ".grpo_trainer": "NextFlowGRPOTrainer",
    ".image_tokenizer_config": "NextFlowImageTokenizerTrainingConfig",
    ".image_tokenizer_losses": "FeatureLoss PatchDiscriminator",
    ".image_tokenizer_trainer": "NextFlowImageTokenizerTrainer",
    ".packing": "PackSampler make_packs rank_imbalance sample_costs sequence_flops",
    ".reward_call": "RewardOutput",
    ".rewards": "DetectedObject Word detector_reward image_text_reward ocr_reward remote_reward scored_reward",
    ".sft_config": "NextFlowSFTConfig",
    ".sft_trainer": "NextFlowSFTTrainer",
    "..token_layout": "scale_weights",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
