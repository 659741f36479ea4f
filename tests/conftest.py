"""What more than one test file needs.

Torch, transformers and diffusers are imported where they are used: the process that hands out the tests to its workers
reads this file too, and needs none of them.
"""

import logging
import os
import sys
from pathlib import Path

import pytest

from forks import FRESH, run

# The tests' tensors are small: more threads only wait for each other. Before torch is imported, and for subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

NUM_SCALES = 5  # of the tiny random checkpoint
CODEBOOK_SIZE = 64

LIBRARIES = ("transformers", "diffusers", "trl", "peft", "accelerate")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A single file runs in this process: workers would each import torch for it."""
    paths = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(paths) == 1 and Path(*paths).is_file() else None


class DeprecationIsAnError(logging.Handler):
    """The libraries log a part of their deprecations; pyproject.toml makes errors of those that are warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message:
            raise DeprecationWarning(message)


@pytest.fixture(scope="session", autouse=True)
def no_deprecated_calls():
    handler = DeprecationIsAnError()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)


def build_byte_tokenizer():
    """Qwen's tokenizer with a vocabulary of single bytes (ids 0 to 255), then its special tokens and NextFlow's."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return Qwen2Tokenizer(
        vocab={character: byte for byte, character in bytes_to_unicode().items()},
        merges=[],
        padding_side="left",
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    )


@pytest.fixture(scope="session")
def tiny_random_checkpoint(tmp_path_factory) -> Path:
    return save_tiny_random_checkpoint(tmp_path_factory.mktemp("tiny_random_checkpoint"))


@pytest.fixture(scope="session")
def tiny_tokenflow_checkpoint(tmp_path_factory) -> Path:
    """TokenFlow's golden model and image tokenizer, converted: 4 scales (64 x 64 pixels), 64 codes."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tokenflow_source import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("tiny_tokenflow_checkpoint"))


def save_tiny_random_checkpoint(folder: Path) -> Path:
    """A plain transformers checkpoint of random weights: 5 scales (80 x 80 pixels), 64 codes, a vocabulary of bytes."""
    import torch

    from transformers_nextflow import (
        NextFlowConfig,
        NextFlowForCausalLM,
        NextFlowImageProcessor,
        NextFlowImageTokenizer,
        NextFlowImageTokenizerConfig,
        NextFlowProcessor,
    )

    tokenizer = build_byte_tokenizer()
    special_ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("boi", "eoi", "image")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NextFlowForCausalLM(
            NextFlowConfig(
                text_vocab_size=len(tokenizer),
                visual_codebook_size=CODEBOOK_SIZE,
                vocab_size=len(tokenizer) + CODEBOOK_SIZE,
                visual_code_dim=12,
                num_scales=NUM_SCALES,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=512,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                **{f"{name}_token_id": token_id for name, token_id in special_ids.items()},
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
            )
        )
        image_tokenizer = NextFlowImageTokenizer(
            NextFlowImageTokenizerConfig(
                codebook_size=CODEBOOK_SIZE,
                semantic_code_dim=8,
                pixel_code_dim=4,
                num_scales=NUM_SCALES,
                semantic_config={
                    "model_type": "siglip2_vision_model",
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                },
                semantic_decoder_layers=1,
                semantic_decoder_num_heads=2,
                pixel_patch_size=4,
                encoder_hidden_sizes=[8, 8, 8],
                encoder_num_res_blocks=1,
                decoder_hidden_sizes=[8, 8, 8],
                decoder_num_res_blocks=1,
                latent_channels=8,
                cnn_norm_groups=2,
            )
        )
    model.save_pretrained(folder)
    processor = NextFlowProcessor(
        image_processor=NextFlowImageProcessor(num_scales=NUM_SCALES),
        tokenizer=tokenizer,
        image_tokenizer=image_tokenizer,
        visual_token_offset=model.config.text_vocab_size,
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fresh_process():
    """Runs code where neither transformers nor the package was imported; returns the last line that it prints."""

    def last_line(code: str, *arguments: str, **environment: str) -> str:
        done = FRESH.run(["-c", code, *arguments], environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().rpartition("\n")[2]

    return last_line


@pytest.fixture(scope="session")
def forked_process():
    """The same in a fork of this process, for what may have been imported before."""

    def last_line(code: str, *arguments: str) -> str:
        done = run([sys.executable, "-c", code, *arguments], capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().rpartition("\n")[2]

    return last_line


@pytest.fixture(autouse=True)
def usual_logging():
    """The command makes the libraries silent, and a module's fixture may run it: right for a process of its own."""
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in {"transformers", "diffusers"} & sys.modules.keys():
        sys.modules[name].utils.logging.enable_progress_bar()
