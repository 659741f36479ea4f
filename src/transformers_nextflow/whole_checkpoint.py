"""Loading that leaves nothing to chance: safetensors only, and every weight from the checkpoint."""

from pathlib import Path


class WholeCheckpointMixin:
    """Makes a model's `from_pretrained` refuse pickled and partial checkpoints. It stands before `PreTrainedModel`.

    Attributes:
        size_fields (`tuple[str, ...]`): The fields of the config that an error about wrong sizes points to.
    """

    size_fields: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As in transformers, but nothing is left to chance: every weight must be in the checkpoint, at its full size.

        Raises:
            `ValueError`: if weights are missing or of another size (pass `ignore_mismatched_sizes=True` to initialise
            the latter anew), if the checkpoint holds pickled weights only, or if quantisation is to untie embeddings.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if not kwargs["use_safetensors"]:
            raise ValueError("NextFlow loads safetensors only (pickled weights can run code): drop `use_safetensors`.")
        if getattr(kwargs.get("quantization_config"), "untie_embedding_weights", False):
            # transformers would overwrite the head with the smaller table of text, without a word
            raise ValueError("NextFlow's head and input embeddings aren't tied: leave `untie_embedding_weights` False.")
        accept_mismatches = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]  # PreTrainedModel's
                pretrained_model_name_or_path,
                *args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except OSError as error:
            folder = Path(pretrained_model_name_or_path or "") / (kwargs.get("subfolder") or "")
            if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
                raise ValueError(
                    f'"{folder}" holds pickled weights (*.bin) only, and NextFlow loads safetensors only. Load them '
                    "where you trust them and write them again with `save_pretrained`."
                ) from error
            raise
        if info["missing_keys"]:
            raise ValueError(
                f'"{pretrained_model_name_or_path}" is not a whole {cls.__name__} checkpoint. Missing weights: '
                f"{', '.join(sorted(info['missing_keys']))}. (`{cls.__name__}(config)` makes a new model.)"
            )
        if info["mismatched_keys"] and not accept_mismatches:
            sizes = ", ".join(
                f"{name} has {tuple(found)} instead of {tuple(expected)}"
                for name, found, expected in sorted(info["mismatched_keys"])
            )
            raise ValueError(
                f'Weights in "{pretrained_model_name_or_path}" don\'t have the sizes that its config states: {sizes}. '
                f"Check {' and '.join(f'`{name}`' for name in cls.size_fields)}, or convert the checkpoint again."
            )
        return (model, info) if output_loading_info else model
