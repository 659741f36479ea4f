"""Image processor of NextFlow on torchvision."""

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ImageInput

from .image_processing_pil_nextflow import NextFlowBaseImageProcessor


class NextFlowImageProcessor(NextFlowBaseImageProcessor, TorchvisionBackend):  # type: ignore[misc]  # other steps
    r"""
    Brings images to sizes that have a scale schedule, and to values in [-1, 1].

    An image keeps its aspect ratio: it goes to the nearest of the 41 buckets, at `num_scales` scales, and is resized to
    fill the frame and cropped at the centre (`do_pad=True`: resized to fit in and padded). Images are turned upright by
    their EXIF tag; transparent ones are put on `background_color`.

    Args:
        num_scales (`int`, *optional*, defaults to 18):
            Number of scales of every image: 12 for 256-level images, 16 for 512, 18 for 1024.
        height (`int`, *optional*), width (`int`, *optional*):
            Force one size in pixels for all images; it must be a schedule's size.
        stride (`int`, *optional*, defaults to 16): Pixels a cell of the last grid.
        do_pad (`bool`, *optional*, defaults to `False`):
            Fit the whole image in and pad it, instead of filling the frame and cropping.
        background_color (`list[int]`, *optional*, defaults to `[255, 255, 255]`):
            Red, green and blue behind transparent pixels and in the padding.
        resample (`int`, *optional*, defaults to bicubic): The `PIL.Image.Resampling` filter; resizing is antialiased.
        do_resize, do_rescale, do_normalize (`bool`, *optional*, defaults to `True`):
            The steps. Without `do_resize` an image must already have a schedule's size.
        rescale_factor, image_mean, image_std:
            By default they bring 0 ... 255 to [-1, 1].
        max_pixels, max_aspect_ratio, allow_urls, allow_paths, max_download_bytes, max_download_seconds:
            What is opened, and how large it may be; see [`SourceLimits`].

    Calling it returns a [`BatchFeature`] with:
        - **pixel_values** -- float `(num_images, 3, H, W)` if all come out in one size, else a list of `(3, H, W)`.
        - **image_grid_shw** -- `(num_images, 3)` int64: number of scales, bucket height, bucket width.

    Raises:
        `ValueError`: for a size that no schedule has, an image that cannot be read, or values out of range.

    Example:

    ```python
    >>> from PIL import Image
    >>> from transformers_nextflow import NextFlowImageProcessor

    >>> batch = NextFlowImageProcessor(num_scales=8)(Image.new("RGB", (640, 480)), return_tensors="pt")
    >>> batch.pixel_values.shape, batch.image_grid_shw.tolist()
    (torch.Size([1, 3, 112, 144]), [[8, 14, 18]])
    ```
    """

    def process_image(  # type: ignore[override]
        self, image: ImageInput, do_convert_rgb=None, device=None, **kwargs
    ) -> torch.Tensor:
        return torch.from_numpy(self._read(image, **kwargs)).permute(2, 0, 1).contiguous().to(device)

    def pad_around(self, image: torch.Tensor, frame: tuple[int, int], color) -> torch.Tensor:
        height, width = image.shape[-2:]
        padded = torch.tensor(list(color), dtype=image.dtype, device=image.device)[:, None, None].repeat(1, *frame)
        top, left = (frame[0] - height) // 2, (frame[1] - width) // 2
        padded[:, top : top + height, left : left + width] = image
        return padded


__all__ = ["NextFlowImageProcessor"]
