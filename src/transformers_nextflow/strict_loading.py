"""Strict loading: safetensors only, and every weight comes from the checkpoint, whole and finite."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.modeling_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .whole_folder import PARTIAL, whole_folder

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def read_json(path: Any, name: str, **kwargs) -> dict[str, Any] | None:
    """The object in a JSON file of a folder or Hub repository; None if there is no file, a `ValueError` for a bad one.

    Of `kwargs`, arguments of `from_pretrained`, those that locate a file are used.
    """
    known = {key: kwargs[key] for key in (*HUB_ARGUMENTS, "subfolder") if kwargs.get(key) is not None}
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **known)
    if file is None:
        return None
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except ValueError as error:  # not an object, not JSON, or not UTF-8
        raise ValueError(
            f'"{file}" is damaged: it should hold a JSON object ({error}). Download or save the folder again.'
        ) from error
    return content


class StrictConfigMixin:
    """Makes a configuration's `from_pretrained` refuse a folder without one. It stands before `PreTrainedConfig`."""

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        if os.path.isdir(pretrained_model_name_or_path):
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            found = (read_json(folder, "config.json") or {}).get("model_type")
            if found != cls.model_type:  # type: ignore[attr-defined]
                raise ValueError(
                    f'"{folder}" has no configuration of a {cls.model_type}: '  # type: ignore[attr-defined]
                    + (f'its config.json is that of a "{found}".' if found else "config.json is missing or empty.")
                    + (" Saving was interrupted: see .partial in it." if (folder / PARTIAL).is_dir() else "")
                    + " Pass the folder that the model was saved to, or save or download it again."
                )
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]


class StrictPreTrainedModel(PreTrainedModel):
    """A model whose `from_pretrained` refuses pickled, partial and damaged checkpoints and whose `save_pretrained`
    leaves none.

    Attributes:
        size_fields (`tuple[str, ...]`): The fields of the config that an error about wrong sizes points to.
    """

    size_fields: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, strict: bool = True, output_loading_info: bool = False, **kwargs
    ):
        """As in transformers, but every weight must be in the checkpoint, at its full size.

        Args:
            strict (`bool`, *optional*, defaults to `True`):
                `False` leaves missing and mismatched weights to transformers: missing ones are initialised anew, with a
                warning, and `output_loading_info=True` returns their names.

        Raises:
            `ValueError`: if weights are missing or of another size (pass `ignore_mismatched_sizes=True` to initialise
                the latter anew), are NaN, infinite or no floating-point numbers, if the checkpoint is not all
                safetensors in the folder itself, if a file is damaged, or if quantisation is to untie embeddings.
        """
        path, options = pretrained_model_name_or_path, None
        if kwargs.get("use_safetensors") is None:  # diffusers says so
            kwargs["use_safetensors"] = True
        if not kwargs["use_safetensors"] or kwargs.get("gguf_file"):
            raise ValueError(
                "NextFlow loads safetensors only (pickled weights can run code): drop `use_safetensors`, `gguf_file`."
            )
        if getattr(kwargs.get("quantization_config"), "untie_embedding_weights", False):
            # transformers would overwrite the head with the smaller table of text, without a word
            raise ValueError("NextFlow's head and input embeddings aren't tied: leave `untie_embedding_weights` False.")
        if path is not None:
            _check_names(path, kwargs)
            # transformers would pass over a damaged one, and over an adapter's
            options = read_json(path, "generation_config.json", **kwargs)
        accept_mismatches = kwargs.get("ignore_mismatched_sizes", False)
        kwargs["ignore_mismatched_sizes"] = strict or accept_mismatches
        load: Any = super().from_pretrained
        try:
            model, info = load(path, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f'The weights in "{path}" are damaged ({error}). Download or save them again.') from error
        except OSError as error:
            folder = Path(path or "") / (kwargs.get("subfolder") or "")
            if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
                raise ValueError(
                    f'"{folder}" holds pickled weights (*.bin) only, and NextFlow loads safetensors only. Load them '
                    "where you trust them and write them again with `save_pretrained`."
                ) from error
            raise
        if strict and info["missing_keys"]:
            raise ValueError(
                f'"{path}" is not a whole {cls.__name__} checkpoint. Missing weights: '
                f"{', '.join(sorted(info['missing_keys']))}. (`{cls.__name__}(config)` makes a new model; "
                "`strict=False` initialises what is missing.)"
            )
        if info["mismatched_keys"] and not accept_mismatches:
            sizes = ", ".join(
                f"{name} has {tuple(found)} instead of {tuple(expected)}"
                for name, found, expected in sorted(info["mismatched_keys"])
            )
            raise ValueError(
                f'Weights in "{path}" don\'t have the sizes that its config states: {sizes}. '
                f"Check {' and '.join(f'`{name}`' for name in cls.size_fields)}, or convert the checkpoint again."
            )
        _check_finite(path, model)
        if options and getattr(model, "_hf_peft_config_loaded", False):
            model.generation_config = type(model.generation_config).from_dict(options)
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # Here transformers has found (and fetched) all files, and opened none.
        _check_files(checkpoint_files or [], {} if load_config.is_quantized else model.state_dict())
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """As in transformers, but a reader of the folder finds the whole old model or the whole new one."""
        save = super().save_pretrained
        if kwargs.get("distributed_checkpoint") or not self.should_save_on_this_rank(is_main_process):
            return save(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        names = ("repo_id", "commit_message", "private", "create_pr")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        with whole_folder(save_directory) as partial:
            save(partial, is_main_process, state_dict, **kwargs)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), token=kwargs.get("token"), **hub)


def _check_names(path: Any, kwargs: dict[str, Any]) -> None:
    """Refuses a config or an index of shards that names anything but safetensors files beside it."""
    if (name := (read_json(path, "config.json", **kwargs) or {}).get("transformers_weights")) is not None:
        _check_name(str(name), str(name))
    index_name = _add_variant(SAFE_WEIGHTS_INDEX_NAME, kwargs.get("variant"))
    index = read_json(path, index_name, **kwargs)
    if index is not None and not all(isinstance(index.get(name), dict) for name in ("weight_map", "metadata")):
        raise ValueError(
            f'"{index_name}" in "{path}" is damaged: it must hold the objects `weight_map` and '
            "`metadata`. Download or save the folder again."
        )
    for name in map(str, (index or {"weight_map": {}})["weight_map"].values()):
        _check_name(name, name)


def _check_name(name: str, file: str) -> None:
    if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        raise ValueError(
            f'The checkpoint is to load "{file}". NextFlow loads only safetensors files (*.safetensors) of the '
            "checkpoint's own folder: put them there, and name them so in the index."
        )


def _check_files(files: list[str], expected: dict[str, torch.Tensor]) -> None:
    """Refuses anything but whole safetensors files of one folder, and tensors that should be floats and are not."""
    for file in files:
        _check_name(os.path.relpath(file, os.path.dirname(files[0])), file)
        try:
            with safe_open(file, framework="pt") as tensors:
                dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f'"{file}" is missing or damaged ({error}). Download or save it again.') from error
        floats = {name for name, weight in expected.items() if weight.is_floating_point()}
        wrong = [f"{name} ({dtypes[name]})" for name in floats & dtypes.keys() if "F" not in dtypes[name]]
        if wrong:
            raise ValueError(
                f'"{file}" holds tensors that are no floating-point numbers where the model has weights: '
                f"{', '.join(sorted(wrong))}. Convert the checkpoint again."
            )


@torch.no_grad()
def _check_finite(path: Any, model: torch.nn.Module) -> None:
    """Refuses weights that are NaN or infinite. The sum of each tensor shows them, which reads the weights once."""
    wrong = []
    for name, weight in model.named_parameters():
        plain = type(weight.data) is torch.Tensor and not weight.is_meta and weight.is_floating_point()
        if plain and weight.element_size() > 1:  # torch does not add up 8-bit floats
            total = weight.sum(dtype=torch.float32 if weight.dtype == torch.float16 else None)
            if not total.isfinite() and not weight.isfinite().all():
                wrong.append(name)
    if wrong:
        raise ValueError(
            f'Weights in "{path}" are NaN or infinite: {", ".join(wrong)}. A training that diverged leaves such '
            "weights: load an earlier checkpoint, or convert the checkpoint again."
        )
