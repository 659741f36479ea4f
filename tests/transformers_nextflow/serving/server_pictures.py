"""Pictures as clients send and get them."""

import base64
import io

from PIL import Image


def picture_of(data: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def png_of(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def mask_of(picture: Image.Image) -> Image.Image:
    """A mask of OpenAI's of one of the pipeline's: transparent where that is white."""
    mask = Image.new("RGBA", picture.size, "red")
    mask.putalpha(picture.point(lambda shade: 255 - shade))
    return mask


def uri_of(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png_of(picture)).decode()}"
