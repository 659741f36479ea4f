"""Image processor of NextFlow on PIL and NumPy, and what it shares with the torchvision one: geometry and colours."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from PIL import ExifTags, Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, is_torch_tensor

from .picture_sources import SourceLimits, flatten_pictures, open_picture, plain_mode
from .scale_schedule import ScaleSchedule, nearest_bucket

WHITE = (255, 255, 255)
LARGE = 2**22  # pixels above which a picture is averaged over cells first
TURNS = {  # what makes a picture upright, by its EXIF tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[tag] for tag in (5, 6, 7, 8)]


class NextFlowImageProcessorKwargs(ImagesKwargs, total=False):
    """What [`NextFlowImageProcessor`] takes besides what every image processor does."""

    num_scales: int
    height: int | None
    width: int | None
    stride: int
    background_color: tuple[int, ...] | list[int]
    max_pixels: int
    max_aspect_ratio: float | int
    allow_urls: bool
    allow_paths: bool
    max_download_bytes: int
    max_download_seconds: float | int


def choose_schedule(
    image_size: tuple[int, int],
    num_scales: int,
    height: int | None = None,
    width: int | None = None,
    stride: int = 16,
) -> ScaleSchedule:
    """The schedule of an image of `image_size` (height, width): the nearest aspect, or the size that is asked for."""
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


def shrink(image: Image.Image, frame: tuple[int, int], cover: bool) -> Image.Image:
    """Crops a long picture and averages a large one over cells, so that memory follows the `frame` (height, width).

    At least half as much again as the frame shows is left on each axis; usual pictures stay as they are.
    """
    (width, height), (rows, columns) = image.size, frame
    top = max(0, height - 2 * width * rows // columns - 4) // 2 if cover else 0
    left = max(0, width - 2 * height * columns // rows - 4) // 2 if cover else 0
    ratio = (min if cover else max)(height // rows, width // columns)
    factor = (ratio + 1) // 2 if width * height > LARGE else 1
    box = (left, top, width - left, height - top)
    return image if factor <= 1 and box == (0, 0, width, height) else image.reduce(max(1, factor), box)


def to_rgb(image: Image.Image, background_color: Sequence[int] = WHITE) -> np.ndarray:
    """A picture of 8 bits as `uint8` RGB `(H, W, 3)`, on the background colour where it is transparent."""
    if (mode := plain_mode(image)) == "RGBA":
        opaque = Image.new("RGB", image.size, tuple(background_color))
        image = image if image.mode == mode else image.convert(mode)
        opaque.paste(image, mask=image.getchannel("A"))
        image = opaque
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def find_turn(image: Any) -> Image.Transpose | None:
    """What makes a picture upright, by its EXIF data."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # an array has none, and a picture with damaged EXIF data is a picture still
        return None


def open_eight_bits(
    source: Any, limits: SourceLimits, input_data_format: str | ChannelDimension | None = None
) -> tuple[Image.Image, Image.Transpose | None]:
    """A picture of any source in 8 bits, within the limits, and what makes it upright."""
    image = open_picture(source, limits)
    turn = find_turn(image)  # which the next step forgets
    image = to_eight_bits(image, input_data_format)
    limits.check_size(*image.size, copies=0)
    return image, turn


def to_eight_bits(image: ImageInput, input_data_format: str | ChannelDimension | None = None) -> Image.Image:
    """A PIL image of 8 bits, of a picture or an array with 1, 3 or 4 channels (first or last, or a plain `(H, W)`).

    Arrays hold integers of 8 or 16 bits (wider ones are taken for 8 bits if none is above 255), or floats in [0, 1].
    """
    if isinstance(image, Image.Image) and image.mode[0] not in "IF":
        mode = plain_mode(image)
        return image if mode == image.mode else image.convert(mode)
    array = _to_numpy(image)
    if array.ndim == 2:
        array = array[..., None]
    elif input_data_format is None and array.ndim == 3 and {1, 3, 4} & {*array.shape[::2]}:
        input_data_format = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
    if input_data_format == ChannelDimension.FIRST:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or array.size == 0:
        raise ValueError(f"An image must have height, width and 1, 3 or 4 channels, but has the shape {array.shape}.")
    array = _to_uint8(array)
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _to_uint8(array: np.ndarray) -> np.ndarray:
    kind = array.dtype.kind
    low, high = (array.min(), array.max()) if kind in "biuf" else (math.nan, math.nan)
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return array * np.uint8(255)
    if kind == "f" and 0 <= low <= high <= 1:
        return np.rint(array * 255).astype(np.uint8)
    if kind in "iu" and 0 <= low <= high <= 65535:
        deep = high > 255 or array.dtype == np.uint16
        return np.rint(array / np.float32(257)).astype(np.uint8) if deep else array.astype(np.uint8)
    raise ValueError(
        f"An image must hold integers from 0 to 255, integers from 0 to 65535 (16 bits), or floats from 0 to 1, "
        f"but this one is {array.dtype} from {low} to {high}."
    )


def _to_numpy(array: Any) -> np.ndarray:
    if is_torch_tensor(array):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return np.asarray(array)


def to_pil(pixel_values) -> list[Image.Image]:
    """PIL images of pixels `(B, 3, H, W)` in [-1, 1], a tensor or an array, or of a list of `(3, H, W)`."""
    images = []
    for pixels in pixel_values:
        array = (127.5 * _to_numpy(pixels) + 128).clip(0, 255).astype(np.uint8)  # TokenFlow's rounding, to the bit
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
    max_pixels, max_aspect_ratio, allow_urls, allow_paths, max_download_bytes, max_download_seconds = (
        field.default for field in fields(SourceLimits)
    )
    model_input_names = ["pixel_values", "image_grid_shw"]

    # The back-end's.
    resize: Callable[..., Any]
    pad_around: Callable[..., Any]

    def fetch_images(self, image_url_or_urls):
        pictures = [open_picture(source, SourceLimits.of(vars(self))) for source in flatten_pictures(image_url_or_urls)]
        return pictures if isinstance(image_url_or_urls, list | tuple) else pictures[0]

    def preprocess(self, images, *args, **kwargs) -> BatchFeature:
        try:
            return super().preprocess(images, *args, **kwargs)
        except StrictDataclassError as error:  # an option of a wrong type
            raise ValueError(str(error)) from error

    def _prepare_image_like_inputs(self, images, *args, **kwargs) -> Iterator[Any]:  # type: ignore[override]
        # One by one: of a call's pictures one at a time is held at the size that it came in.
        return (self.process_image(source, **kwargs) for source in flatten_pictures(images))

    def _read(self, source, background_color=WHITE, input_data_format=None, **kwargs) -> np.ndarray:
        """A picture of any source as `uint8` RGB `(H, W, 3)`, not much larger than what it is resized to."""
        image, turn = open_eight_bits(source, SourceLimits.of(kwargs), input_data_format)
        if kwargs["do_resize"]:
            upright = turn not in SIDEWAYS
            width, height = image.size if upright else image.size[::-1]
            options = (kwargs[name] for name in ("num_scales", "height", "width", "stride"))
            schedule = choose_schedule((height, width), *options)
            frame = (schedule.height, schedule.width) if upright else (schedule.width, schedule.height)
            image = shrink(image, frame, cover=not kwargs["do_pad"])
        return to_rgb(image if turn is None else image.transpose(turn), background_color)

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
        mean, std = np.ravel(kwargs["image_mean"]), np.ravel(kwargs["image_std"])
        finite = all(map(math.isfinite, [kwargs["rescale_factor"], *mean, *std]))
        if not finite or not np.all(std) or not {len(mean), len(std)} <= {1, 3}:
            raise ValueError(
                "`rescale_factor`, `image_mean` and `image_std` (3 each) must be finite, `image_std` not 0, but got "
                f"{kwargs['rescale_factor']}, {kwargs['image_mean']} and {kwargs['image_std']}."
            )
        if kwargs["do_normalize"] and not kwargs["do_rescale"]:
            raise ValueError(
                "`do_rescale=False` with `do_normalize=True` would normalize values from 0 to 255. Leave `do_rescale` "
                "on: floats from 0 to 1 are recognised; or turn `do_normalize` off as well for values as they are."
            )
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
        images: Iterator[Any],
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
        if not rows:
            raise ValueError("`images` is empty; give at least one image.")
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

    def process_image(self, image: ImageInput, do_convert_rgb=None, **kwargs) -> np.ndarray:  # type: ignore[override]
        return np.moveaxis(self._read(image, **kwargs), -1, 0)

    def pad_around(self, image: np.ndarray, frame: tuple[int, int], color) -> np.ndarray:
        height, width = image.shape[-2:]
        padded = np.empty((3, *frame), dtype=image.dtype)
        padded[:] = np.asarray(color, dtype=image.dtype)[:, None, None]
        top, left = (frame[0] - height) // 2, (frame[1] - width) // 2
        padded[:, top : top + height, left : left + width] = image
        return padded


__all__ = ["NextFlowImageProcessorPil"]
