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
        if name is None:
            if self.held:
                self.model.disable_adapters()
            return
        if name not in self.held:
            folder = str(self.settings.adapter_folders[name])
            self.model.load_adapter(folder, adapter_name=name, use_safetensors=True)
            self.model.eval()
        self.held[name] = None
        self.held.move_to_end(name)
        while len(self.held) > self.settings.max_adapters:
            self.model.delete_adapter(self.held.popitem(last=False)[0])
        self.model.enable_adapters()
        self.model.set_adapter(name)


__all__ = ["Adapters"]
