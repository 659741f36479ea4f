"""What a server is told when it starts: one list of settings, from a file, the command line or a caller."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..configuration_nextflow import NextFlowConfig, NextFlowImageTokenizerConfig

Count = Annotated[int, Field(ge=1)]
Bytes = Annotated[int, Field(ge=0)]


class ServingSettings(BaseModel):
    """The settings of a server.

    Args:
        model (`str`, *optional*): Folder of a checkpoint; nextflow-tiny by default.
        name (`str`, *optional*): The model's name for clients; by default that of the folder.
        device (`str`, *optional*): "cpu", "cuda", ...; by default a GPU if there is one.
        dtype (`str`, *optional*):
            By default float32 on a CPU, where a seed gives one picture in any batch, and bfloat16 elsewhere, where the
            batch changes the rounding.
        gpus (`float`, *optional*):
            GPUs of a replica, a part of one included; 1 by default where there is one and `device` is not "cpu".
        threads (`int`, *optional*): Threads of a replica on the CPU; torch decides by default.
        replicas (`int`, *optional*, defaults to 1): Processes with a model each.
        max_batch (`int`, *optional*, defaults to 8): Rows that are drawn together.
        max_queue (`int`, *optional*, defaults to 64): Rows of a replica, running ones included; more get a 429.
        request_seconds (`float`, *optional*, defaults to 300): Most seconds for a request; then a 504.
        api_key (`str`, *optional*): What clients must send; the environment variable `NEXTFLOW_API_KEY` by default.
        allow_urls (`bool`, *optional*, defaults to `False`):
            Whether pictures in chats may be https URLs of public addresses.
        adapters (`str`, *optional*): Folder with one folder for each LoRA adapter, served as `name:adapter`.
        max_adapters (`int`, *optional*, defaults to 4): Adapters that a replica holds; the least used one goes.
        session_bytes (`int`, *optional*, defaults to 2**29): Keys and values of conversations on a replica's device.
        session_host_bytes (`int`, *optional*, defaults to 2**30): The same and those moved to the CPU's memory.
        max_responses (`int`, *optional*, defaults to 10000): Answers that `previous_response_id` may name.
        max_images (`int`, *optional*, defaults to 10): Pictures of a request, in and out.
        max_prompt_chars (`int`, *optional*, defaults to 32000): Characters of all texts of a request.
        max_body_bytes (`int`, *optional*, defaults to 2**25): Bytes of a request.
        max_pixels (`int`, *optional*, defaults to 2**24): Pixels of a picture, read off its header.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model: str | None = None
    name: str | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    gpus: Annotated[float, Field(ge=0, lt=1000)] | None = None
    threads: Count | None = None
    replicas: Count = 1
    max_batch: Count = 8
    max_queue: Count = 64
    request_seconds: Annotated[float, Field(gt=0, lt=1e9)] = 300.0
    api_key: str | None = None
    allow_urls: bool = False
    adapters: str | None = None
    max_adapters: Count = 4
    session_bytes: Bytes = 2**29
    session_host_bytes: Bytes = 2**30
    max_responses: Count = 10_000
    max_images: Count = 10
    max_prompt_chars: Count = 32_000
    max_body_bytes: Count = 2**25
    max_pixels: Count = 2**24

    @model_validator(mode="after")
    def _check(self) -> "ServingSettings":
        if self.max_batch > self.max_queue:
            raise ValueError(f"`max_batch` ({self.max_batch}) must not be above `max_queue` ({self.max_queue})")
        if self.adapters is not None and not Path(self.adapters).is_dir():
            raise ValueError(f'`adapters` must be a folder with a folder for each adapter; "{self.adapters}" is none')
        return self

    @classmethod
    def of(cls, values: Any) -> "ServingSettings":
        """The settings in a mapping, each of which must be known and legal, or a `ValueError` names it."""
        if not isinstance(values, dict):
            raise ValueError(f"Settings are a mapping of names to values, but got {values!r:.80}.")
        try:
            return cls(**{str(name): value for name, value in values.items()})
        except ValidationError as error:
            problems = [f"`{'.'.join(map(str, part['loc']))}`: {part['msg']}" for part in error.errors()]
            raise ValueError(
                f"Settings of the server: {'; '.join(problems)}. There are: {', '.join(cls.model_fields)}."
            ) from error

    @classmethod
    def read(cls, file: str | os.PathLike, **overrides: Any) -> "ServingSettings":
        """The settings in a YAML file, and over them others."""
        try:
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f'"{file}" is not a readable YAML file: {error}') from error
        return cls.of({**values, **overrides} if isinstance(values, dict) else overrides if values is None else values)

    @property
    def folder(self) -> Path:
        """The checkpoint's folder; a `ValueError` unless it is one of NextFlow's."""
        from .. import tiny_checkpoint

        folder = tiny_checkpoint() if self.model is None else Path(self.model)
        if not folder.is_dir():
            raise ValueError(f'`model` must be the folder of a checkpoint, and "{folder}" is no folder.')
        NextFlowConfig.from_pretrained(folder)
        NextFlowImageTokenizerConfig.from_pretrained(folder, subfolder="image_tokenizer")
        return folder

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.name or self.folder.resolve().name

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """Adapters by their names, those that came after the start included."""
        if self.adapters is None:
            return {}
        return {file.parent.name: file.parent for file in sorted(Path(self.adapters).glob("*/adapter_config.json"))}

    @property
    def key(self) -> str | None:
        return self.api_key or os.environ.get("NEXTFLOW_API_KEY") or None


__all__ = ["ServingSettings"]
