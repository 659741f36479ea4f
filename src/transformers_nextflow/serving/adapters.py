"""LoRA adapters on one model: loaded when they are first asked for, the least used ones put away."""

import json
from collections import OrderedDict
from typing import Any

from .errors import ApiError
from .settings import ServingSettings


class Adapters:
    """The adapters of a model. Called by the thread that draws alone, but for `check`.

    Args:
        model ([`NextFlowForCausalLM`]): The model.
        settings ([`ServingSettings`]): `adapters`, the folder of folders, and `max_adapters`.
    """

    def __init__(self, model: Any, settings: ServingSettings):
        self.model, self.settings = model, settings
        self.held: OrderedDict[str, None] = OrderedDict()

    def check(self, name: str | None) -> None:
        """An [`ApiError`] unless there is such an adapter, a LoRA in safetensors (pickled weights can run code)."""
        if name is None:
            return
        folder = self.settings.adapter_folders.get(name)
        if folder is None:
            raise ApiError(f'There is no adapter "{name}".', status=404, param="model", code="model_not_found")
        try:
            kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
        except (OSError, ValueError, AttributeError):
            kind = "damaged"
        if kind != "LORA" or not (folder / "adapter_model.safetensors").is_file():
            raise ApiError(
                f'The adapter "{name}" can\'t be served: it must be a LoRA (it is {kind}) in safetensors.',
                param="model",
            )

    def use(self, name: str | None) -> None:
        """Makes an adapter, or the bare model for None, what draws from here on."""
        if name is not None and name not in self.held:
            folder = str(self.settings.adapter_folders[name])
            self.model.load_adapter(folder, adapter_name=name, use_safetensors=True)
            self.model.eval()
        for layer in self._layers():
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(name)
        if name is not None:
            self.held[name] = None
            self.held.move_to_end(name)
        while len(self.held) > self.settings.max_adapters:
            self._drop(self.held.popitem(last=False)[0])

    def _drop(self, name: str) -> None:
        for layer in self._layers():
            layer.delete_adapter(name)
        del self.model.peft_config[name]

    def _layers(self) -> list[Any]:
        """Layers with adapters: transformers' own methods for all of them want a newer PEFT than its loading does."""
        if getattr(self.model, "peft_config", None) is None:
            return []
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]


__all__ = ["Adapters"]
