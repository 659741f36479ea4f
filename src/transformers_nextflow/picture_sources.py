"""Where pictures and videos come from: paths, URLs and base64 strings, within limits, checked before decoding."""

import base64
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from transformers.image_utils import is_valid_image
from transformers.video_utils import load_video

VIDEO_MARK = "<video>"

# What decoders hold at once, in units of four bytes per pixel (measured on Pillow 13); 1 where it is not told.
COPIES = {"WEBP": 4, "JPEG2000": 5, "AVIF": 3}
LONGEST_SIDE = 2048  # of the pictures that the model reads
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")


@dataclass(frozen=True)
class SourceLimits:
    """What may be opened, and how large it may be. The image processor has a field of the same name for each.

    Args:
        max_pixels (`int`):
            Most pixels of a picture that is not decoded yet, read off its header; a format whose decoder holds several
            copies counts so many times, and so does what is converted. A large JPEG is decoded at a reduced size.
        max_aspect_ratio (`float`): Most that the long side may be of the short one.
        allow_urls (`bool`): Whether http(s) URLs are opened.
        allow_paths (`bool`): Whether local files are opened.
        max_download_bytes (`int`): The most bytes that a URL may send.
        max_download_seconds (`float`): The most seconds that a download may take in all.
    """

    max_pixels: int = 44_000_000
    max_aspect_ratio: float = 64.0
    allow_urls: bool = True
    allow_paths: bool = True
    max_download_bytes: int = 2**26
    max_download_seconds: float = 60.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SourceLimits":
        """The limits among other settings; missing ones have their defaults."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None})

    def check_size(self, width: int, height: int, copies: int = 1) -> None:
        """Raises a `ValueError` unless a picture of that size may be opened."""
        if not width * height:
            raise ValueError(f"it has {width} x {height} pixels")
        if width * height * copies > self.max_pixels:
            counted = f" (counted {copies} times, for what its decoder holds)" if copies > 1 else ""
            raise ValueError(
                f"it has {width} x {height} pixels{counted}, more than `max_pixels` ({self.max_pixels}). Make it "
                "smaller, or raise `max_pixels` of the image processor if there is memory for it"
            )
        if max(width, height) > self.max_aspect_ratio * max(1, min(width, height)):
            raise ValueError(
                f"it has {width} x {height} pixels, and its long side is more than `max_aspect_ratio` "
                f"({self.max_aspect_ratio:g}) of the short one. Crop it, or raise `max_aspect_ratio` of the image "
                "processor"
            )


def open_picture(source: Any, limits: SourceLimits = SourceLimits()) -> Any:
    """A picture that is loaded: a PIL image, or an array as it is. A `ValueError` names what cannot be opened.

    Unlike `transformers.image_utils.load_image` it keeps transparency, so that the background shows through. A source
    is a path, an http(s) URL, a base64 string (`data:image/...` or bare), or a picture.
    """
    if is_valid_image(source) and not isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | os.PathLike | Image.Image):
        legal = "a PIL image, an array, a tensor, a path, a URL or a base64 string"
        raise TypeError(f"An image must be {legal}, but got {type(source)}.")
    name = getattr(source, "filename", "") or "given" if isinstance(source, Image.Image) else os.fspath(source)
    try:
        image = source if isinstance(source, Image.Image) else _open_image(os.fspath(source), limits)
        is_decoded = not getattr(image, "tile", ())
        limits.check_size(*image.size, 0 if is_decoded else _count_copies(image))
        image.load()
        return image
    except Exception as error:  # decoders raise whatever they like
        raise ValueError(
            f'Could not open the image "{shorten(name)}": {shorten(str(error) or type(error).__name__, 400)}. '
            "It must be a picture, the path of an image file, an http(s) URL or a base64 string."
        ) from error


def _open_image(source: str, limits: SourceLimits) -> Image.Image:
    Image.init()
    image = Image.open(_open(source, "image", limits), formats=[name for name in FORMATS if name in Image.OPEN])
    if not image.info.get("progressive"):
        image.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))  # a JPEG can be read at 1/2, 1/4 or 1/8 of its size
    return image


def plain_mode(image: Image.Image) -> str:
    """The mode of 8 bits in which a picture is averaged and composited."""
    if image.has_transparency_data:
        return "RGBA"
    return image.mode if image.mode in ("L", "RGB", "CMYK") else "RGB"


def _count_copies(image: Image.Image) -> int:
    if image.mode[0] in "IF":  # more than 8 bits, which NumPy brings down
        return 5
    converted = 1 + (image.mode != plain_mode(image)) + (plain_mode(image) == "RGBA")
    return max(2 if image.info.get("progressive") else COPIES.get(image.format or "", 1), converted)


def shorten(text: str, length: int = 80) -> str:
    """The text, cut to a length that messages can hold."""
    return text if len(text) <= length else text[: length - 3] + "..."


def _open(source: str, kind: str, limits: SourceLimits) -> str | BytesIO:
    """A file to be read: the path itself, or bytes in memory."""
    if source.startswith(("http://", "https://")):
        if not limits.allow_urls:
            raise ValueError("URLs are not opened here (`allow_urls` is False)")
        return BytesIO(_download(source, limits))
    if source.startswith(f"data:{kind}/"):
        return BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
    if limits.allow_paths and os.path.isfile(source):
        return source
    try:
        return BytesIO(base64.b64decode(source, validate=True))
    except ValueError:
        where = "no such file" if limits.allow_paths else "local files are not opened here (`allow_paths` is False)"
        raise ValueError(where) from None


def _download(url: str, limits: SourceLimits) -> bytes:
    """The body of a URL. A thread reads it, since nothing else ends a server's slow lines of header in time."""
    outcome: list[Any] = [ValueError(f"it took longer than `max_download_seconds` ({limits.max_download_seconds:g})")]
    deadline = time.monotonic() + limits.max_download_seconds

    def read() -> None:
        try:
            request = Request(url, headers={"User-Agent": "transformers-nextflow"})
            with urlopen(request, timeout=limits.max_download_seconds) as response:
                body = bytearray()
                while piece := response.read1(2**16):
                    body += piece
                    if len(body) > limits.max_download_bytes:
                        raise ValueError(f"it sends more than `max_download_bytes` ({limits.max_download_bytes})")
                    if time.monotonic() > deadline:
                        return
                if response.length:  # http.client's own check is in `read` only
                    raise ValueError(f"{response.length} bytes of its body are missing")
            outcome.append(bytes(body))
        except Exception as error:
            outcome.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(limits.max_download_seconds)
    if isinstance(outcome[-1], Exception):
        raise outcome[-1]
    return outcome[-1]


def flatten_pictures(images: Any) -> list[Any]:
    """Pictures one by one, in any nesting of lists; an array with four axes is several."""
    if images is None:
        return []
    if isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4:
        return [picture for entry in images for picture in flatten_pictures(entry)]
    return [images]


def flatten_videos(videos: Any) -> Iterator[Any]:
    """Videos one by one, however they are nested (each chat has a list); a video is a path, a URL, or frames."""
    first = videos[0] if isinstance(videos, list | tuple) and videos else None
    is_frame = isinstance(first, Image.Image) or getattr(first, "ndim", 0) == 3
    if isinstance(videos, str | os.PathLike) or getattr(videos, "ndim", 0) == 4 or is_frame:
        yield videos
    elif isinstance(videos, list | tuple) or getattr(videos, "ndim", 0) == 5:
        for entry in videos:
            yield from flatten_videos(entry)
    else:
        raise ValueError(
            "A video is a list of pictures, an array of shape (frames, height, width, 3), a path or a URL, but "
            f"`videos` holds an object of type {type(videos).__name__}."
        )


def sample_frames(video: Any, number: int, limits: SourceLimits = SourceLimits()) -> list[Any]:
    """`number` frames of a video, evenly spaced, first and last among them; all frames of a shorter one."""

    def places(length: int) -> list[int]:
        if not length:
            raise ValueError("it has no frames")
        return np.linspace(0, length - 1, min(number, length)).round().astype(int).tolist()

    def choose(metadata, **_) -> list[int]:
        limits.check_size(metadata.width or 1, metadata.height or 1)
        return places(metadata.total_num_frames)

    source = os.fspath(video) if isinstance(video, str | os.PathLike) else None
    try:
        if source is None:
            return [video[place] for place in places(len(video))]
        path = _open(source, "video", limits)
        with TemporaryDirectory() as folder:
            if isinstance(path, BytesIO):
                file = Path(folder, "video")
                file.write_bytes(path.getbuffer())
                path = str(file)
            return list(load_video(path, sample_indices_fn=choose)[0])  # type: ignore[arg-type]
    except ImportError:  # says what to install
        raise
    except Exception as error:
        name = "given" if source is None else shorten(source)
        raise ValueError(f'Could not read the video "{name}": {shorten(str(error), 400)}.') from error


def place_frames(
    texts: list[str], images: Any, videos: Any, num_frames: int, image_token: str, limits: SourceLimits
) -> tuple[list[str], Any]:
    """Texts with an `<image>` for each frame of a `<video>`, and the pictures with the frames among them."""
    num_marks = sum(text.count(VIDEO_MARK) for text in texts)
    if videos is None and not num_marks:
        return texts, images
    if not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, a whole number, but got {num_frames}.")
    given = [] if videos is None else list(flatten_videos(videos))
    _check_number("videos", given, num_marks, VIDEO_MARK)
    pictures = iter(match_pictures(images, [text.count(image_token) for text in texts], image_token))
    clips, merged = iter(given), []

    def spread(mark: re.Match) -> str:
        new = sample_frames(next(clips), num_frames, limits) if mark[0] == VIDEO_MARK else [next(pictures)]
        merged.extend(new)
        return image_token * len(new)

    return [re.sub(f"{re.escape(VIDEO_MARK)}|{re.escape(image_token)}", spread, text) for text in texts], merged


def match_pictures(images: Any, num_marks: list[int], image_token: str) -> list[Any]:
    """All pictures in reading order; checks that they are as many as the marks."""
    if isinstance(images, list | tuple) and images and all(isinstance(group, list | tuple) for group in images):
        counts = [len(group) for group in images]
        if counts != num_marks:
            raise ValueError(
                f"The texts have {num_marks} `{image_token}` marks, but the lists of `images` have {counts} pictures. "
                "Pass one list a text, with one picture a mark."
            )
    pictures = flatten_pictures(images)
    _check_number("images", pictures, sum(num_marks), image_token)
    return pictures


def _check_number(name: str, given: list[Any], num_marks: int, mark: str) -> None:
    if len(given) != num_marks:
        raise ValueError(
            f"`text` has {num_marks} `{mark}` marks, but there are {len(given)} {name} (`{name}`). Put one mark into "
            "the text where each of them stands, and pass one for each mark."
        )
