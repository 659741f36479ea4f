"""Pictures of requests, opened within limits, and pictures of answers, as bytes."""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

from PIL import Image

from ..picture_sources import SourceLimits, open_picture, shorten
from .errors import ApiError
from .settings import ServingSettings

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
USED_INFO = ("exif", "xmp", "Raw profile type exif", "transparency")  # says how a picture stands, and what shows
FETCH_SECONDS = 10.0


def read_picture(
    data: bytes, settings: ServingSettings, param: str, formats: tuple[str, ...] = UPLOAD_FORMATS
) -> Image.Image:
    """The picture in an upload. Its size is read off its header, and checked, before anything is decoded."""
    limits = replace(SourceLimits(allow_urls=False, allow_paths=False), max_pixels=settings.max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            picture = open_picture(image, limits).copy()
    except Exception as error:  # decoders raise whatever they like
        raise ApiError(
            f"`{param}` can't be opened as a picture ({', '.join(formats)}): {shorten(str(error), 300)}",
            param=param,
            code="invalid_image",
        ) from error
    picture.info = {name: picture.info[name] for name in USED_INFO if name in picture.info}
    return picture


def read_mask(data: bytes, settings: ServingSettings) -> Image.Image:
    """A mask of OpenAI's, a PNG, as one of the pipeline's: white where it is fully transparent, black elsewhere."""
    picture = read_picture(data, settings, "mask", ("PNG",))
    if not picture.has_transparency_data:
        raise ApiError(
            "`mask` must be a PNG with an alpha channel: fully transparent where the picture is drawn anew.",
            param="mask",
            code="invalid_image",
        )
    return picture.convert("RGBA").getchannel("A").point([255, *[0] * 255])


def fetch_picture(url: str, settings: ServingSettings, param: str) -> Image.Image:
    """The picture of a data URI, or of an https URL where those are allowed."""
    if url.startswith("data:"):
        head, _, content = url.partition(",")
        if not head.endswith(";base64"):
            raise ApiError(f"`{param}` must be a data URI in base64: data:image/png;base64,...", param=param)
        try:
            return read_picture(base64.b64decode(content, validate=True), settings, param)
        except binascii.Error as error:
            raise ApiError(f"`{param}` is no valid base64: {error}", param=param, code="invalid_image") from error
    if not settings.allow_urls:
        raise ApiError(
            f"`{param}` must be a data URI (data:image/png;base64,...): this server fetches no URLs.", param=param
        )
    try:
        return read_picture(download(url, settings.max_body_bytes), settings, param)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ApiError(f"`{param}` can't be fetched: {shorten(str(error), 300)}", param=param) from error


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet."""
    ip = ipaddress.ip_address(address)
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return ip.is_global and not ip.is_multicast and (inner is None or inner.is_global)


def download(
    url: str,
    max_bytes: int,
    allowed: Callable[[str], bool] = is_public,
    context: ssl.SSLContext | None = None,
) -> bytes:
    """The body of an https URL, whose host must have allowed addresses only; redirects are not followed.

    The connection goes to an address that was checked, so a name can't turn into another one in between.

    Raises:
        `ValueError` or `OSError`: if it is not https, not allowed, too large, too slow, or not there.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.username is not None:
        raise ValueError("it must be an https URL without a user name")
    port = parts.port or 443
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(allowed, addresses)):
        raise ValueError("its host is not at a public address")
    context = context or ssl.create_default_context()
    connection = http.client.HTTPSConnection(parts.hostname, port, timeout=FETCH_SECONDS)
    try:
        plain = socket.create_connection((addresses[0], port), FETCH_SECONDS)
        connection.sock = context.wrap_socket(plain, server_hostname=parts.hostname)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "transformers-nextflow", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"it answers with status {response.status} (redirects are not followed)")
        body = bytearray()
        while piece := response.read1(2**16):
            body += piece
            if len(body) > max_bytes:
                raise ValueError(f"it sends more than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"it took longer than {FETCH_SECONDS:g} seconds")
        return bytes(body)
    finally:
        connection.close()


def write_picture(picture: Image.Image, output_format: str = "png", compression: int | None = None) -> str:
    """A picture as base64. `compression` is OpenAI's `output_compression`: 100 is the best quality of jpeg and webp."""
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": 100 if compression is None else compression}
    picture.save(buffer, output_format.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


__all__ = ["download", "fetch_picture", "is_public", "read_mask", "read_picture", "write_picture"]
