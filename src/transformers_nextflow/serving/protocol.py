"""Requests of OpenAI's API: which fields there are, and what may stand in them.

A field that is not listed here is refused by name, as is one whose value would have no effect. Fields beyond OpenAI's
are those of [`~NextFlowGenerationMixin.generate`], and `seed`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator

from .errors import ApiError

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
PerScale = Number | list[Number]
Guidance = Annotated[float, Field(ge=0, le=100)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=100)]


class Request(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str | None = None
    seed: Seed | None = None
    stream: StrictBool | None = None
    guidance_scale: Guidance | None = None
    image_temperature: PerScale | None = None
    image_top_k: int | list[int] | None = None
    image_top_p: PerScale | None = None
    # These label requests for whoever reads them; they change nothing, at OpenAI's as here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def image_options(self) -> dict[str, Any]:
        """Options of `generate` for pictures; diffusers' rule that guidance of at most 1 is off."""
        names = ("guidance_scale", "image_guidance_scale", "image_temperature", "image_top_k", "image_top_p")
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        if "guidance_scale" in given:
            given["guidance_scale"] = max(1.0, given["guidance_scale"])
        return given


class PictureOptions(BaseModel):
    """How pictures look, and how they are sent; also the fields of the tool `image_generation`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    size: str | None = None
    quality: str | None = None
    background: str | None = None
    moderation: Literal["auto", "low"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None

    @field_validator("size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value in (None, "auto"):
            return None
        width, cross, height = value.partition("x")
        if not (cross and all(side.isascii() and side.isdigit() and len(side) <= 6 for side in (width, height))):
            raise ValueError(f'must be "auto" or "WIDTHxHEIGHT", like "1024x768", not {value!r:.40}')
        return value

    @field_validator("quality")
    @classmethod
    def _quality(cls, value: str | None) -> str | None:
        if value not in (None, "auto", "standard"):
            raise ValueError(f'can be "auto" or "standard" alone, not {value!r:.40}: there is one quality')
        return value

    @field_validator("background")
    @classmethod
    def _background(cls, value: str | None) -> str | None:
        if value not in (None, "auto", "opaque"):
            raise ValueError(f'can be "auto" or "opaque", not {value!r:.40}: pictures have no transparency')
        return value

    @property
    def kind(self) -> str:
        """The file format of pictures."""
        return self.output_format or "png"


class ImageRequest(Request, PictureOptions):
    """`POST /v1/images/generations`."""

    prompt: Text
    n: Annotated[int, Field(ge=1)] | None = None
    response_format: str | None = None
    style: None = None
    negative_prompt: str | None = None

    @field_validator("response_format")
    @classmethod
    def _response_format(cls, value: str | None) -> str | None:
        if value not in (None, "b64_json"):
            raise ValueError(f'can be "b64_json" alone, not {value!r:.40}: this server stores no pictures')
        return value


class EditRequest(ImageRequest):
    """The fields of `POST /v1/images/edits` beside its files."""

    input_fidelity: None = None
    image_guidance_scale: Guidance | None = None
    image_in_prompt: StrictBool | None = None


class ImageUrl(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ChatPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ChatPart], Field(min_length=1)]
    name: None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: StrictBool = False


class TextRequest(Request):
    """What chat completions and responses have in common."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    max_new_images: Annotated[int, Field(ge=0)] | None = None

    def text_options(self, max_tokens: int | None) -> dict[str, Any]:
        """Options of `generate` for text. A temperature samples; 0, and none, takes the likeliest."""
        options: dict[str, Any] = {} if max_tokens is None else {"max_new_tokens": max_tokens}
        if self.temperature or self.top_p is not None:
            options |= {"do_sample": True, "temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0}
        return options


class ChatRequest(TextRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    modalities: Annotated[list[Literal["text", "image"]], Field(min_length=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(min_length=1, max_length=4)] | None = None
    stream_options: StreamOptions | None = None
    thinking: StrictBool | None = None
    size: str | None = None

    _check_size = field_validator("size")(PictureOptions._size.__func__)  # type: ignore[attr-defined]


class InputPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["input_text", "input_image"]
    text: str | None = None
    image_url: str | None = None
    detail: Literal["auto", "low", "high"] | None = None


class InputMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["message"] | None = None
    role: Literal["user"]
    content: str | Annotated[list[InputPart], Field(min_length=1)]


class ImageTool(PictureOptions):
    type: Literal["image_generation"]
    model: None = None


class ToolChoice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image_generation"]


class ResponseRequest(TextRequest):
    """`POST /v1/responses`."""

    input: Text | Annotated[list[InputMessage], Field(min_length=1, max_length=1)]
    previous_response_id: str | None = None
    tools: Annotated[list[ImageTool], Field(min_length=1, max_length=1)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    store: StrictBool | None = None


AnyRequest = TypeVar("AnyRequest", bound=BaseModel)


def parse(model: type[AnyRequest], values: Any, from_form: bool = False) -> AnyRequest:
    """A request, or an [`ApiError`] that names the first field that is wrong. In a form all values are strings."""
    if not isinstance(values, Mapping):
        raise ApiError("The body of the request must be a JSON object.")
    try:
        return model.model_validate_strings(values) if from_form else model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # Between the names of fields stand those of a union's branches.
        path = [str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int)]
        param = ".".join(part for part in path if part == part.lower() and part not in ("str", "int", "float")) or None
        if first["type"] == "extra_forbidden":
            param = str(first["loc"][-1])[:80]
            raise ApiError(f"Unknown parameter: {param!r}.", param=param, code="unknown_parameter") from error
        if first["type"] == "missing":
            raise ApiError(f"Missing parameter: `{param}`.", param=param, code="missing_required_parameter") from error
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(f"`{param}`: {message}.", param=param, code="invalid_value") from error


__all__ = ["ChatRequest", "EditRequest", "ImageRequest", "PictureOptions", "Request", "ResponseRequest", "parse"]
