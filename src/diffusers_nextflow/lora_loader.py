"""LoRA in the pipeline, by diffusers' names: load, weigh, swap, fuse and unload adapters that PEFT saved."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers_nextflow import NextFlowGenerationConfig

GENERATION = "generation_config.json"


class NextFlowLoraLoaderMixin:
    """
    Adapters of a pipeline's `model`, as diffusers' pipelines have them; they are PEFT's own underneath. Folders are
    those that [`~transformers_nextflow.trainer.NextFlowSFTTrainer`] saves with `peft_config`. How an adapter was
    prompted (`prompt_styles`) holds while it is in use.
    """

    model: Any
    _styles: dict[str, dict[str, str] | None]  # of the base (under "") and of every adapter

    def load_lora_weights(self, folder: str | Path, adapter_name: str | None = None) -> None:
        """Loads an adapter and puts it to use, alone.

        Args:
            folder (`str` or `Path`): With `adapter_config.json`.
            adapter_name (`str`, *optional*): `"default"` for the first, `"default_1"` for the next, ...

        Raises:
            `ValueError`: if there is no LoRA in the folder, or another adapter has the name.
        """
        peft = _peft()
        names = self.get_list_adapters()
        name = adapter_name or f"default_{len(names)}".removesuffix("_0")
        if name in names:
            raise ValueError(f'An adapter is called "{name}" already; give another `adapter_name`, or unload it first.')
        if not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(f'"{folder}" has no `adapter_config.json`: it is no adapter that PEFT saved.')
        config = peft.PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, peft.LoraConfig):
            raise ValueError(f'"{folder}" is an adapter of the kind {config.peft_type}, but LoRA was expected.')
        if not names:
            self._styles = {"": copy.deepcopy(self.model.generation_config.prompt_styles)}
            self.model = peft.PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
        else:
            self.model.load_adapter(str(folder), name)
        self._styles[name] = self._styles[""]
        if (Path(folder) / GENERATION).is_file():
            own = getattr(NextFlowGenerationConfig.from_pretrained(folder), "prompt_styles", None)
            self._styles[name] = {**(self._styles[""] or {}), **(own or {})}
        self.set_adapters(name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Uses one adapter or several at once, each with a weight (1 by default).

        With several, prompts are those of the first one.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        known = self.get_list_adapters()
        if not names or not set(names) <= set(known):
            raise ValueError(f"Loaded adapters are {', '.join(known) or 'none'}, but got {', '.join(names) or 'none'}.")
        if len(weights) != len(names):
            raise ValueError(f"Got {len(names)} adapters but {len(weights)} weights.")
        self.model.base_model.set_adapter(names, inference_mode=True)
        for layer in _lora_layers(self.model):
            for name, weight in zip(names, weights, strict=True):
                if name in layer.scaling:
                    layer.set_scale(name, 1.0 if weight is None else weight)
        self.model.generation_config.prompt_styles = self._styles[names[0]]

    def get_list_adapters(self) -> list[str]:
        """The names of all adapters that are loaded."""
        return list(getattr(self.model, "peft_config", ()))

    def get_active_adapters(self) -> list[str]:
        """The names of those that are in use."""
        return list(self.model.active_adapters) if self.get_list_adapters() else []

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Removes adapters; the last one by [`unload_lora_weights`]."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if self.get_list_adapters() == [name]:
                self.unload_lora_weights()
            else:
                self.model.delete_adapter(name)
                self.set_adapters(self.get_list_adapters()[0])

    def fuse_lora(self) -> None:
        """Adds the adapters in use, with their weights, to the model's own weights: no extra work while drawing."""
        self._need_adapters().merge_adapter()

    def unfuse_lora(self) -> None:
        """Takes them out again."""
        self._need_adapters().unmerge_adapter()

    def unload_lora_weights(self) -> None:
        """Removes all adapters. What was fused stays in the model's weights, which then can be saved."""
        adapted = self._need_adapters()
        fused = any(layer.merged for layer in _lora_layers(adapted))
        styles = self._styles[self.get_active_adapters()[0] if fused else ""]
        self.model = adapted.unload()
        self.model.generation_config.prompt_styles = styles

    def _need_adapters(self) -> Any:
        if not self.get_list_adapters():
            raise ValueError("No adapter is loaded; `load_lora_weights(folder)` loads one.")
        return self.model


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('Adapters need PEFT; run `pip install "transformers-nextflow[train]"`.') from error
    return peft


def _lora_layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


__all__ = ["NextFlowLoraLoaderMixin"]
