"""Both image processors: sizes, colours, agreement with each other, loading and saving, bad input."""

import base64
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from transformers import AutoImageProcessor

from transformers_nextflow import NextFlowImageProcessor, NextFlowImageProcessorPil, ScaleSchedule, aspect_buckets
from transformers_nextflow.image_processing_pil_nextflow import choose_schedule, resized_size, to_pil, to_rgb

LEVEL = 2 / 255  # one of 255 levels, on the scale of [-1, 1]


@pytest.fixture(params=[NextFlowImageProcessor, NextFlowImageProcessorPil], ids=["torchvision", "pil"])
def processor(request):
    return request.param(num_scales=8)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def levels(pixel_values) -> np.ndarray:
    """Pixels in [-1, 1] as 0 to 255."""
    return np.asarray((torch.as_tensor(np.asarray(pixel_values)) + 1) * 127.5)


# Sizes


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (333, 500), (1000, 250), (20, 100), (3, 2)])
def test_aspect_is_kept(processor, size):
    batch = processor(photo(*size), return_tensors="pt")
    schedule = ScaleSchedule.from_grid_shw(batch.image_grid_shw[0].tolist())
    assert batch.pixel_values.shape == (1, 3, schedule.height, schedule.width)
    assert batch.image_grid_shw.dtype == torch.int64
    assert schedule.num_scales == 8
    width, height = size
    distances = {bucket: abs(np.log(bucket[0] / bucket[1]) - np.log(height / width)) for bucket in aspect_buckets()}
    assert distances[schedule.bucket] == min(distances.values())


def test_extreme_aspect_is_cropped(processor):
    assert processor(photo(1000, 50), return_tensors="pt").image_grid_shw.tolist() == [[8, 8, 32]]


def test_number_of_scales_and_forced_size(processor):
    assert processor(photo(64, 64), num_scales=12, return_tensors="pt").pixel_values.shape == (1, 3, 256, 256)
    batch = processor(photo(64, 64), height=80, width=64, return_tensors="pt")
    assert batch.pixel_values.shape == (1, 3, 80, 64)
    assert ScaleSchedule.from_grid_shw(batch.image_grid_shw[0].tolist()) == ScaleSchedule.from_size(80, 64)


def test_resized_size():
    assert resized_size((100, 300), (64, 64), cover=True) == (64, 192)
    assert resized_size((100, 300), (64, 64), cover=False) == (21, 64)
    assert resized_size((1, 1000), (64, 64), cover=False) == (1, 64)
    for height in range(1, 60):
        for cover in (True, False):
            h, w = resized_size((height, 37), (48, 80), cover)
            assert (h >= 48 and w >= 80 and (h == 48 or w == 80)) if cover else (h <= 48 and w <= 80)


def test_crop_takes_the_centre(processor):
    image = Image.new("RGB", (300, 100), "red")
    ImageDraw.Draw(image).rectangle((100, 0, 199, 99), fill="lime")
    pixels = levels(processor(image, height=128, width=128, return_tensors="np").pixel_values[0])
    assert (pixels[1, :, 3:-3] > 250).all() and (pixels[0, :, 3:-3] < 5).all()


def test_padding_keeps_the_whole_image(processor):
    image = Image.new("RGB", (300, 100), "lime")
    batch = processor(image, height=96, width=96, do_pad=True, background_color=(255, 0, 10), return_tensors="np")
    pixels = levels(batch.pixel_values[0])
    np.testing.assert_allclose(pixels[:, :32].reshape(3, -1).T, np.tile([255, 0, 10], (32 * 96, 1)), atol=1e-3)
    np.testing.assert_allclose(pixels[:, 32:64].reshape(3, -1).T, np.tile([0, 255, 0], (32 * 96, 1)), atol=1e-3)
    np.testing.assert_allclose(pixels[:, 64:].reshape(3, -1).T, np.tile([255, 0, 10], (32 * 96, 1)), atol=1e-3)


def test_images_of_one_size_are_stacked_others_listed(processor):
    batch = processor([photo(64, 64), photo(90, 90)], return_tensors="pt")
    assert batch.pixel_values.shape == (2, 3, 128, 128)
    batch = processor([photo(64, 64), photo(90, 60)], return_tensors="pt")
    assert [tuple(image.shape) for image in batch.pixel_values] == [(3, 128, 128), (3, 96, 160)]
    assert all(isinstance(image, torch.Tensor) for image in batch.pixel_values)
    assert batch.image_grid_shw.tolist() == [[8, 16, 16], [8, 13, 19]]
    batch = processor([photo(64, 64), photo(90, 60)])
    assert isinstance(batch.pixel_values, list) and batch.image_grid_shw == [(8, 16, 16), (8, 13, 19)]


def test_without_resizing(processor):
    image = photo(64, 80)
    batch = processor(image, do_resize=False, return_tensors="np")
    np.testing.assert_allclose(levels(batch.pixel_values[0]), np.moveaxis(np.asarray(image), -1, 0), atol=1e-4)
    with pytest.raises(ValueError, match="No scale schedule ends at height 80 x width 70"):
        processor(photo(70, 80), do_resize=False)


# Colours


def test_values_span_minus_one_to_one(processor):
    image = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(image).rectangle((0, 0, 31, 63), fill=255)
    pixels = processor(image, return_tensors="pt").pixel_values
    assert pixels.dtype == torch.float32
    assert pixels.min() == -1 and pixels.max() == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_colour_modes(processor, mode):
    expected = photo(128, 128).convert(mode).convert("RGB")
    pixels = levels(processor(photo(128, 128).convert(mode), return_tensors="np").pixel_values[0])
    np.testing.assert_allclose(pixels, np.moveaxis(np.asarray(expected), -1, 0), atol=1e-3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_shows_the_background(processor, mode):
    image = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    ImageDraw.Draw(image).rectangle((0, 0, 127, 63), fill=(0, 0, 0, 0))
    if mode == "P":
        image = image.getchannel("A").quantize(2)  # two colours, both black, one of them clear
        image.info["transparency"] = image.getpixel((0, 0))
        image.putpalette([0] * 6)
    image = image.convert(mode)
    pixels = levels(processor(image, return_tensors="np").pixel_values[0])
    assert (pixels[:, :64] == 255).all() and (pixels[:, 64:] == 0).all()
    pixels = levels(processor(image, background_color=[0, 0, 200], return_tensors="np").pixel_values[0])
    np.testing.assert_allclose(pixels[:, 0, 0], [0, 0, 200], atol=1e-3)


def test_half_transparent():
    image = Image.new("RGBA", (4, 4), (100, 0, 0, 51))  # a fifth
    assert to_rgb(image)[0, 0].tolist() == [224, 204, 204]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits(processor, mode):
    gradient = np.linspace(0, 65535, 128).astype(np.uint16)
    array = np.tile(gradient, (128, 1))
    image = Image.fromarray(array if mode == "I;16" else array.astype(np.int32))
    assert image.mode == mode
    expected = np.tile(gradient / 257, (3, 128, 1))
    np.testing.assert_allclose(levels(processor(image, return_tensors="np").pixel_values[0]), expected, atol=0.51)
    np.testing.assert_allclose(levels(processor(array, return_tensors="np").pixel_values[0]), expected, atol=0.51)


def test_wide_modes_with_eight_bits(processor):
    image = photo(128, 128).convert("L")
    expected = processor(image, return_tensors="np").pixel_values
    np.testing.assert_array_equal(processor(image.convert("I"), return_tensors="np").pixel_values, expected)
    unit = Image.fromarray(np.asarray(image, np.float32) / 255)
    assert unit.mode == "F"
    np.testing.assert_array_equal(processor(unit, return_tensors="np").pixel_values, expected)


def test_arrays_and_tensors(processor):
    image = photo(128, 128)
    array = np.asarray(image)
    expected = processor(image, return_tensors="np").pixel_values
    for same in (
        array,
        np.moveaxis(array, -1, 0),
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255,
        array / 255,
        array.astype(np.int64),
    ):
        np.testing.assert_array_equal(processor(same, return_tensors="np").pixel_values, expected)
    batch = processor(torch.from_numpy(np.stack([array] * 2)).permute(0, 3, 1, 2), return_tensors="np").pixel_values
    np.testing.assert_array_equal(batch, np.concatenate([expected] * 2))
    flat = processor(array[..., 0], return_tensors="np").pixel_values
    np.testing.assert_array_equal(flat[0, 0], expected[0, 0])
    half = torch.from_numpy(array.copy()).permute(2, 0, 1).bfloat16() / 256
    np.testing.assert_allclose(levels(processor(half, return_tensors="np").pixel_values), levels(expected), atol=2)


def test_upright(processor):
    image = photo(128, 128)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    buffer = io.BytesIO()
    image.rotate(90).save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(
        processor(Image.open(buffer), return_tensors="np").pixel_values,
        processor(image, return_tensors="np").pixel_values,
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("size", [(128, 96), (2800, 1000)], ids=["small", "averaged"])
def test_every_turn(kind, size):
    """As PIL turns them; a long picture is cropped in the right direction."""
    processor = NextFlowImageProcessorPil(num_scales=5)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        buffer = io.BytesIO()
        photo(*size).save(buffer, kind, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(buffer))
        turned, expected = (processor(image, return_tensors="np") for image in (Image.open(buffer), upright))
        assert turned.image_grid_shw.tolist() == expected.image_grid_shw.tolist()
        # Cells that are averaged may begin at the other side.
        np.testing.assert_allclose(levels(turned.pixel_values), levels(expected.pixel_values), atol=10)


# Sources


def test_paths_urls_and_base64(processor, tmp_path):
    image = Image.new("RGBA", (128, 128), (255, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    encoded = base64.b64encode((tmp_path / "clear.png").read_bytes()).decode()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        sources = [
            tmp_path / "clear.png",
            str(tmp_path / "clear.png"),
            encoded,
            f"data:image/png;base64,{encoded}",
            f"{url}/clear.png",
        ]
        for source in sources:
            # The background, not the red behind the transparency.
            assert (processor(source, return_tensors="pt").pixel_values == 1).all()
        with pytest.raises(ValueError, match=r"Could not open the image .*missing\.png"):
            processor(f"{url}/missing.png")
        server.shutdown()
    (tmp_path / "text.txt").write_text("not a picture")
    (tmp_path / "half.png").write_bytes((tmp_path / "clear.png").read_bytes()[:100])
    for source in (
        str(tmp_path / "text.txt"),
        str(tmp_path / "half.png"),
        "no such file.png",
        "aGVsbG8=",
        "data:image/png;base64",
    ):
        with pytest.raises(ValueError, match=r"Could not open the image .* path of an image file, an http"):
            processor(source)
    with pytest.raises(TypeError, match="An image must be a PIL image, an array, a tensor, a path"):
        processor([3.5])


# Together


@pytest.mark.parametrize(
    "options", [{}, {"do_pad": True}, {"num_scales": 5}, {"resample": 2}, {"height": 48, "width": 64}]
)
@pytest.mark.parametrize("size", [(640, 480), (50, 200), (99, 101)])
def test_back_ends_agree(size, options):
    settings = {"num_scales": 8, **options}
    batches = [
        make(**settings)(photo(*size), return_tensors="pt")
        for make in (NextFlowImageProcessor, NextFlowImageProcessorPil)
    ]
    difference = (batches[0].pixel_values - batches[1].pixel_values).abs()
    assert difference.max() <= 2.01 * LEVEL  # both round between rows and columns
    assert difference.mean() < 0.1 * LEVEL
    assert torch.equal(batches[0].image_grid_shw, batches[1].image_grid_shw)


def test_to_pil_inverts(processor):
    image = photo(128, 128)
    (back,) = processor.postprocess(processor(image, return_tensors="pt").pixel_values)
    assert back.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(back), np.asarray(image))
    bright, dark = to_pil(torch.stack([torch.full((3, 2, 2), 1.7), torch.full((3, 2, 2), -9.0)]).bfloat16())
    assert bright.getpixel((0, 0)) == (255, 255, 255) and dark.getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("back_end", ["torchvision", "pil"])
def test_save_and_load(tmp_path, back_end):
    source = NextFlowImageProcessorPil(num_scales=6, do_pad=True, background_color=[1, 2, 3], stride=8)
    source.save_pretrained(tmp_path)
    kind = {"torchvision": NextFlowImageProcessor, "pil": NextFlowImageProcessorPil}[back_end]
    for loaded in (kind.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path, backend=back_end)):
        assert type(loaded) is kind
        assert loaded.to_dict() == source.to_dict()
    assert source.to_dict()["image_processor_type"] == "NextFlowImageProcessor"


# Bad input


def test_bad_sizes(processor):
    with pytest.raises(ValueError, match=r"No scale schedule ends at height 100 x width 128.*nearest legal sizes"):
        processor(photo(64, 64), height=100, width=128)
    with pytest.raises(ValueError, match="Give both `height` and `width`, or neither; got height=128 and width=None"):
        processor(photo(64, 64), height=128)
    with pytest.raises(ValueError, match="`num_scales` must be between 1 and 18, but got 19"):
        processor(photo(64, 64), num_scales=19)
    with pytest.raises(ValueError, match="does not take `size`, `crop_size`: the size follows from `num_scales`"):
        processor(photo(64, 64), size={"height": 64, "width": 64}, crop_size=32)
    with pytest.raises(ValueError, match="does not take `do_center_crop`"):
        processor(photo(64, 64), do_center_crop=True)
    for color in ([0, 0], [0, 0, 256]):
        with pytest.raises(ValueError, match="`background_color` must be red, green and blue"):
            processor(photo(64, 64), background_color=color)
    assert choose_schedule((10, 10), 8) == ScaleSchedule((16, 16), 8)


def test_bad_images(processor):
    with pytest.raises(ValueError, match="`images` is empty"):
        processor([])
    with pytest.raises(ValueError, match="1, 3 or 4 channels, but has the shape"):
        processor(np.zeros((0, 5, 3), np.uint8), input_data_format="channels_last")
    with pytest.raises(ValueError, match="1, 3 or 4 channels, but has the shape"):
        processor(np.zeros((5, 5, 2), np.uint8), input_data_format="channels_last")
    for array in (np.full((8, 8, 3), 255.0), np.full((8, 8, 3), -0.5), np.full((8, 8, 3), 70000)):
        with pytest.raises(ValueError, match=r"must hold integers from 0 to 255, .* or floats from 0 to 1, but"):
            processor(array)
    with pytest.raises(ValueError, match=r"but this one is int32 from -5 to -5"):
        processor(Image.fromarray(np.full((8, 8), -5, np.int32)))
    with pytest.raises(ValueError, match=r"but this one is float32 from 9\.0 to 9\.0"):
        processor(Image.fromarray(np.full((8, 8), 9, np.float32)))
    with pytest.raises(ValueError, match=r"integers from 0 to 255, .* but this one is float64 from nan to nan"):
        processor(np.full((8, 8, 3), np.nan))
