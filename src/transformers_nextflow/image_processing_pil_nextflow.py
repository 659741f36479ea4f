"""Image processor of NextFlow on PIL and NumPy, and what it shares with the torchvision one: geometry and colours."""

import base64
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, is_torch_tensor

from .scale_schedule import ScaleSchedule, nearest_bucket

WHITE = (255, 255, 255)


class NextFlowImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    num_scales (`int`, *optional*, defaults to `self.num_scales`):
        Number of scales of every image, which with its aspect ratio decides its size.
    height (`int`, *optional*):
        Forces the height in pixels; goes with `width` and must be a schedule's size.
    width (`int`, *optional*):
        Forces the width in pixels.
    stride (`int`, *optional*, defaults to `self.stride`):
        Pixels a cell of the last grid; the image tokenizer's.
    do_pad (`bool`, *optional*, defaults to `self.do_pad`):
        Whether to fit the whole image in and pad it, instead of filling the frame and cropping the centre.
    background_color (`list[int]`, *optional*, defaults to `self.background_color`):
        Red, green and blue, 0 to 255: what shows behind transparent pixels and in the padding.
    """

    num_scales: int
    height: int | None
    width: int | None
    stride: int
    background_color: tuple[int, ...] | list[int]


def choose_schedule(
    image_size: tuple[int, int],
    num_scales: int,
    height: int | None = None,
    width: int | None = None,
    stride: int = 16,
) -> ScaleSchedule:
    """The schedule of an image of `image_size` (height, width): the nearest aspect, or the size that is asked for.

    Raises:
        `ValueError`: if only one of `height` and `width` is given, or if no schedule has that size.
    """
    if (height is None) != (width is None):
        raise ValueError(f"Give both `height` and `width`, or neither; got height={height} and width={width}.")
    if height is not None and width is not None:
        return ScaleSchedule.from_size(height, width, stride=stride)
    return ScaleSchedule(nearest_bucket(*image_size), num_scales, stride)


def resized_size(image_size: tuple[int, int], frame: tuple[int, int], cover: bool) -> tuple[int, int]:
    """Height and width that an image gets, aspect kept, to cover the `frame` (height, width) or to fit into it."""
    ratios = [target / side for side, target in zip(image_size, frame, strict=True)]
    ratio = max(ratios) if cover else min(ratios)
    limit = max if cover else min
    h, w = (limit(target, max(1, round(side * ratio))) for side, target in zip(image_size, frame, strict=True))
    return h, w


def to_rgb(
    image: ImageInput,
    background_color: tuple[int, ...] | list[int] = WHITE,
    input_data_format: str | ChannelDimension | None = None,
) -> np.ndarray:
    """Any image as `uint8` RGB `(H, W, 3)`: upright (EXIF), transparency composited, 16 bits brought down to 8.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A picture, or an array with 1, 3 or 4 channels (first or last, or a plain `(H, W)`): integers of 8 or 16
            bits (wider ones are taken for 8 bits if none is above 255), or floats in [0, 1].
        background_color (`list[int]`, *optional*, defaults to white):
            What shows behind transparent pixels.
        input_data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"`, where an array's shape leaves it open.

    Raises:
        `ValueError`: for an empty image, values out of range or a shape that is not an image's.
    """
    if not isinstance(image, Image.Image):
        return _array_to_rgb(_to_numpy(image), background_color, input_data_format)
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # more than 8 bits: PIL would clip them
        return _array_to_rgb(np.asarray(image), background_color)
    if "A" in image.getbands() or "transparency" in image.info:
        return _array_to_rgb(np.asarray(image.convert("RGBA")), background_color, ChannelDimension.LAST)
    return np.asarray(image.convert("RGB"))


def _to_numpy(array: Any) -> np.ndarray:
    if is_torch_tensor(array):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return np.asarray(array)


def _array_to_rgb(
    array: np.ndarray,
    background_color: tuple[int, ...] | list[int],
    input_data_format: str | ChannelDimension | None = None,
) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    elif input_data_format is None:
        input_data_format = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
    if input_data_format == ChannelDimension.FIRST:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        raise ValueError(f"An image must have height, width and 1, 3 or 4 channels, but has the shape {array.shape}.")
    array = _to_uint8(array)
    if array.shape[-1] == 4:
        alpha = array[..., 3:] / np.float32(255)
        array = np.rint(array[..., :3] * alpha + np.asarray(background_color, np.float32) * (1 - alpha)).astype(
            np.uint8
        )
    return np.broadcast_to(array, (*array.shape[:2], 3))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return np.rint(array / np.float32(257)).astype(np.uint8)
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.floating) and 0 <= low <= high <= 1:
        return np.rint(array * 255).astype(np.uint8)
    if np.issubdtype(array.dtype, np.integer) and 0 <= low <= high <= 65535:
        return array.astype(np.uint8) if high <= 255 else _to_uint8(array.astype(np.uint16))
    raise ValueError(
        f"An image must hold integers from 0 to 255, integers from 0 to 65535 (16 bits), or floats from 0 to 1, "
        f"but this one is {array.dtype} from {low} to {high}."
    )


def open_images(images):
    """Opens paths, URLs and base64 strings, in any nesting, and leaves images as they are.

    Unlike `transformers.image_utils.load_image` it keeps transparency, so that the background shows through.
    """
    if isinstance(images, list | tuple):
        return [open_images(image) for image in images]
    if isinstance(images, str | os.PathLike):
        return _open_image(os.fspath(images))
    if is_valid_image(images):
        return images[None] if getattr(images, "ndim", None) == 2 else images  # transformers wants a channel axis
    raise TypeError(
        f"An image must be a PIL image, an array, a tensor, a path, a URL or a base64 string, but got {type(images)}."
    )


def _open_image(source: str) -> Image.Image:
    try:
        image = Image.open(_open_source(source))
        image.load()  # now, while errors still have the source's name
        return image
    except (OSError, ValueError, IndexError) as error:
        shown = source if len(source) <= 80 else source[:77] + "..."
        raise ValueError(
            f'Could not open the image "{shown}". '
            "It must be the path of an image file, an http(s) URL or a base64 string."
        ) from error


def _open_source(source: str) -> str | BytesIO:
    if source.startswith(("http://", "https://")):
        with urlopen(Request(source, headers={"User-Agent": "transformers-nextflow"}), timeout=60) as response:
            return BytesIO(response.read())
    if os.path.isfile(source):
        return source
    encoded = source.split(",", 1)[1] if source.startswith("data:image/") else source
    return BytesIO(base64.b64decode(encoded, validate=True))


def to_pil(pixel_values) -> list[Image.Image]:
    """PIL images of pixels `(B, 3, H, W)` in [-1, 1], a tensor or an array, or of a list of `(3, H, W)`."""
    images = []
    for pixels in pixel_values:
        array = np.rint((_to_numpy(pixels).clip(-1, 1) + 1) * 127.5).astype(np.uint8)
        images.append(Image.fromarray(np.moveaxis(array, 0, -1)))
    return images


class NextFlowBaseImageProcessor(BaseImageProcessor):
    """What the two image processors do alike; a back-end says how to load, resize, crop and pad one image."""

    valid_kwargs = NextFlowImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = False
    num_scales = 18
    stride = 16
    background_color = WHITE
    model_input_names = ["pixel_values", "image_grid_shw"]

    # The back-end's.
    resize: Callable[..., Any]
    pad_around: Callable[..., Any]

    def fetch_images(self, image_url_or_urls):
        return open_images(image_url_or_urls)

    def postprocess(self, pixel_values) -> list[Image.Image]:
        """PIL images of decoded pixels `(B, 3, H, W)` in [-1, 1], or of a list of `(3, H, W)`."""
        return to_pil(pixel_values)

    def _validate_preprocess_kwargs(self, **kwargs):
        foreign = [name for name in ("size", "crop_size", "pad_size", "do_center_crop") if kwargs.get(name) is not None]
        if foreign:
            raise ValueError(
                f"NextFlow's image processor does not take {', '.join(f'`{name}`' for name in foreign)}: the size "
                "follows from `num_scales` and the image's aspect ratio, or from `height` and `width`; `do_pad=True` "
                "pads instead of cropping."
            )
        color = kwargs["background_color"]
        if len(color) != 3 or not all(0 <= value <= 255 for value in color):
            raise ValueError(f"`background_color` must be red, green and blue, each from 0 to 255, but got {color}.")
        # The base class would ask for a `size` to resize to.
        super()._validate_preprocess_kwargs(**{**kwargs, "do_resize": None})

    def _fit(self, image, schedule: ScaleSchedule, do_pad: bool, resample, background_color):
        frame = (schedule.height, schedule.width)
        height, width = resized_size(image.shape[-2:], frame, cover=not do_pad)
        image = self.resize(image, SizeDict(height=height, width=width), resample=resample)
        if do_pad:
            return self.pad_around(image, frame, background_color)
        return self.center_crop(image, SizeDict(height=schedule.height, width=schedule.width))  # type: ignore[arg-type]

    def _preprocess(
        self,
        images: list[Any],
        num_scales: int,
        height: int | None,
        width: int | None,
        stride: int,
        do_resize: bool,
        do_pad: bool,
        resample,
        background_color: tuple[int, ...] | list[int],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        if not images:
            raise ValueError("`images` is empty; give at least one image.")
        pixel_values, rows = [], []
        for image in images:
            if do_resize:
                schedule = choose_schedule(image.shape[-2:], num_scales, height, width, stride)
                image = self._fit(image, schedule, do_pad, resample, background_color)
            else:
                schedule = ScaleSchedule.from_size(image.shape[-2], image.shape[-1], stride=stride)
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            pixel_values.append(image)
            rows.append(schedule.grid_shw)
        return _to_batch(pixel_values, rows, return_tensors)


def _to_batch(
    pixel_values: list[Any], rows: Sequence[tuple[int, int, int]], return_tensors: str | TensorType | None
) -> BatchFeature:
    # Images of one size are stacked; of several sizes they stay a list.
    if len({image.shape for image in pixel_values}) == 1:
        return BatchFeature({"pixel_values": pixel_values, "image_grid_shw": rows}, tensor_type=return_tensors)
    converted = [BatchFeature({"pixels": image}, tensor_type=return_tensors)["pixels"] for image in pixel_values]
    return BatchFeature(
        {"pixel_values": converted, "image_grid_shw": rows},
        tensor_type=return_tensors,
        skip_tensor_conversion=["pixel_values"],
    )


class NextFlowImageProcessorPil(NextFlowBaseImageProcessor, PilBackend):  # type: ignore[misc]  # other steps
    r"""
    NextFlow's image processor on PIL and NumPy. See [`NextFlowImageProcessor`] for arguments and results.
    """

    def process_image(
        self, image: ImageInput, do_convert_rgb=None, input_data_format=None, background_color=WHITE, **kwargs
    ) -> np.ndarray:
        return np.moveaxis(to_rgb(image, background_color, input_data_format), -1, 0)

    def pad_around(self, image: np.ndarray, frame: tuple[int, int], color) -> np.ndarray:
        height, width = image.shape[-2:]
        padded = np.empty((3, *frame), dtype=image.dtype)
        padded[:] = np.asarray(color, dtype=image.dtype)[:, None, None]
        top, left = (frame[0] - height) // 2, (frame[1] - width) // 2
        padded[:, top : top + height, left : left + width] = image
        return padded


__all__ = ["NextFlowImageProcessorPil"]
