"""Pictures and videos from anywhere: limits before decoding, servers that misbehave, switches, one kind of error."""

import base64
import io
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from transformers_nextflow import NextFlowImageProcessor, NextFlowImageProcessorPil, NextFlowProcessor, picture_sources
from transformers_nextflow.picture_sources import SourceLimits, open_picture, sample_frames

PEAK = r"""
import ctypes, re, sys
from PIL import Image
from transformers_nextflow import {name}
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024
processor = {name}(num_scales=18)
processor(Image.new("RGB", (1024, 1024)), return_tensors="pt")
ctypes.CDLL(None).malloc_trim(0)  # what is free already would not count
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
before = peak()
for path in sys.argv[1:]:
    try:
        shape = processor(path, return_tensors="pt").pixel_values.shape
        assert shape[-1] * shape[-2] <= 1024**2, shape
    except ValueError as error:
        assert path[:50] in str(error) and ("max_pixels" in str(error) or "max_aspect_ratio" in str(error)), error
print(peak() - before)
"""


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = as_bytes(Image.new("RGB", (8, 8), "red"))


@pytest.fixture
def serve():
    """Starts a server that sends given bytes to each caller, piece by piece, until they hang up; gives its URL."""
    ended, sockets = threading.Event(), []

    def start(pieces, delay: float = 0.0) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def answer() -> None:
            try:
                caller, _ = listener.accept()
                with caller:
                    caller.recv(2**16)
                    for piece in pieces:
                        caller.sendall(piece)
                        if ended.wait(delay):
                            return
            except OSError:
                return

        threading.Thread(target=answer, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"

    yield start
    ended.set()
    for listener in sockets:
        listener.close()


def header(length: int | None = None, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 " + status + (b"\r\nContent-Length: %d" % length if length is not None else b"") + b"\r\n\r\n"


def endless(piece: bytes, number: int = 10**6):
    return (piece for _ in range(number))


def test_a_picture_comes_over_http(serve):
    assert open_picture(serve([header(len(PNG)), PNG])).size == (8, 8)
    assert open_picture(serve([header(), PNG])).size == (8, 8)  # no length: until the end


@pytest.mark.parametrize(
    ("pieces", "delay", "reason"),
    [
        ([header(len(PNG) + 99), PNG], 0, "99 bytes of its body are missing"),
        ([b"nonsense\r\n\r\n"], 0, "nonsense"),
        ([b""], 0, "closed connection"),
        ([header(0, b"404 Not Found")], 0, "404"),
        ([header(4), b"text"], 0, "cannot identify"),
        ((header(), *[b"x" * 2**16] * 64), 0, r"more than `max_download_bytes` \(1000000\)"),
        ((header(10**6), *[b"x"] * 10**5), 0.05, r"longer than `max_download_seconds` \(0.5\)"),
        ((b"HTTP/1.1 200 OK\r\n", *[b"X"] * 10**5), 0.05, r"longer than `max_download_seconds` \(0.5\)"),
    ],
    ids=[
        "short body",
        "bad status line",
        "no answer",
        "not found",
        "no picture",
        "endless",
        "slow body",
        "slow header",
    ],
)
def test_a_server_that_misbehaves(serve, pieces, delay, reason):
    url = serve(pieces, delay)
    with pytest.raises(ValueError, match=f'image "{url}".*{reason}'):
        open_picture(url, SourceLimits(max_download_bytes=10**6, max_download_seconds=0.5 if delay else 60))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a b", "http://[::1", "http://127.0.0.1:port/x", "http://\n"])
def test_urls_that_are_none(url):
    with pytest.raises(ValueError, match="Could not open the image"):
        open_picture(url)


def test_long_sources_are_shortened_in_errors():
    with pytest.raises(ValueError) as caught:
        open_picture("data:image/png;base64," + "!" * 10**5)
    assert len(str(caught.value)) < 700


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, about tags
def test_damaged_files_are_named(tmp_path):
    """Whatever a decoder raises is a ValueError with the file's name."""
    wholes = {
        kind: as_bytes(Image.new("RGB", (32, 32), "red"), kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP")
    }
    random = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for whole in wholes.values():
        for _ in range(60):
            damaged = bytearray(whole)
            for place in random.integers(0, len(whole), 3):
                damaged[place] = random.integers(0, 256)
            path.write_bytes(damaged[: random.integers(1, len(whole) + 1)])
            try:
                open_picture(path)
            except ValueError as error:
                assert "damaged" in str(error)


def test_a_picture_with_damaged_exif_data_is_a_picture():
    image = Image.new("RGB", (20, 10), "red")
    exif = image.getexif()
    exif[0x0112], exif[0x010E] = 6, "text"
    for data, size in (
        (exif.tobytes(), (10, 20)),
        (b"Exif\0\0nonsense", (20, 10)),
        (b"II*\0\xff\xff\xff\xff", (20, 10)),
    ):
        opened = Image.open(io.BytesIO(as_bytes(image, "JPEG", exif=data)))
        read = NextFlowImageProcessorPil(num_scales=5)._read(opened, do_resize=False)
        assert read.shape[1::-1] == size


def test_switches(tiny_random_checkpoint, tmp_path, serve):
    processor = NextFlowProcessor.from_pretrained(tiny_random_checkpoint)
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    url = serve([header(len(PNG)), PNG])
    encoded = base64.b64encode(PNG).decode()
    assert processor("<image>", images=str(path)).image_grid_shw == [[5, 16, 16]]
    processor.image_processor.allow_paths = processor.image_processor.allow_urls = False
    for source, reason in (
        (str(path), "`allow_paths` is False"),
        (path, "`allow_paths`"),
        (url, "`allow_urls` is False"),
    ):
        messages = [{"role": "user", "content": [{"type": "image", "image": source}]}]
        for call in (
            lambda source=source: processor("<image>", images=source),
            lambda source=source: processor.image_processor(source),
            lambda source=source: processor.image_processor.fetch_images([source]),
            lambda messages=messages: processor.apply_chat_template(messages, tokenize=True, return_dict=True),
            lambda source=source: processor("<video>", videos=source),
        ):
            with pytest.raises(ValueError, match=reason):
                call()
    for source in (encoded, f"data:image/png;base64,{encoded}", Image.new("RGB", (8, 8))):
        assert processor("<image>", images=source).image_grid_shw == [[5, 16, 16]]
    assert processor("<image>", images=str(path), allow_paths=True).image_grid_shw == [[5, 16, 16]]


def test_limits_can_be_raised(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(as_bytes(Image.new("L", (1300, 10))))
    processor = NextFlowImageProcessor(num_scales=5, max_pixels=12_000)
    with pytest.raises(ValueError, match=r"1300 x 10 pixels, more than `max_pixels` \(12000\)"):
        processor(path)
    with pytest.raises(ValueError, match=r"1300 x 10 pixels, .* `max_aspect_ratio` \(64\)"):
        processor(path, max_pixels=13_000)
    raised = processor(path, max_pixels=13_000, max_aspect_ratio=130.0, return_tensors="pt")
    assert raised.image_grid_shw.tolist() == [[5, 8, 32]]
    with pytest.raises(ValueError, match="max_aspect_ratio"):
        processor(np.zeros((1, 200, 3), np.uint8))
    processor.save_pretrained(tmp_path)
    assert NextFlowImageProcessor.from_pretrained(tmp_path).max_pixels == 12_000


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(as_bytes(Image.new("L", (8200, 4100)), "JPEG"))
    assert open_picture(path, SourceLimits(max_pixels=10**7)).size == (4100, 2050)
    path.write_bytes(as_bytes(Image.new("L", (4000, 3000)), "JPEG"))
    assert open_picture(path).size == (4000, 3000)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak of a process")
@pytest.mark.parametrize("name", ["NextFlowImageProcessor", "NextFlowImageProcessorPil"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_no_small_file_takes_much_memory(name, fresh_process, tmp_path):
    files = {
        ("PNG", "RGB"): [(65_000, 1), (1, 65_000), (8000, 3), (64, 1), (7000, 7000), (6630, 6630)],
        ("PNG", "1"): [(13_000, 13_000)],
        ("PNG", "RGBA"): [(4095, 4095), (4690, 4690)],
        ("PNG", "P"): [(4690, 4690)],
        ("WEBP", "RGB"): [(3500, 3500)],
    }
    if name.endswith("Pil"):
        files = {("PNG", "RGB"): [(65_000, 1), (64, 1)], ("TIFF", "F"): [(3000, 3000)]}
    paths = []
    for (kind, mode), sizes in files.items():
        for size in sizes:
            paths.append(str(tmp_path / f"{mode}_{size[0]}x{size[1]}.{kind.lower()}"))
            options = {"TIFF": {"compression": "tiff_deflate"}, "WEBP": {"lossless": True}}.get(kind, {})
            Image.new(mode, size).save(paths[-1], kind, **options)
    assert int(fresh_process(PEAK.format(name=name), *paths)) < 300


def test_shrinking_keeps_what_is_seen():
    """A large or a long picture comes out as it does without crop and averaging, but for rounding."""
    y, x = np.mgrid[:2400, :2000]
    smooth = np.stack([x * 255 // 2000, y * 255 // 2400, (x + y) % 4400 * 255 // 4400], -1).astype(np.uint8)
    processor = NextFlowImageProcessorPil(num_scales=5)
    large = processor(smooth, return_tensors="np")  # averaged over cells first
    small = processor(Image.fromarray(smooth).resize((1000, 1200), Image.Resampling.BOX), return_tensors="np")
    assert np.abs(large.pixel_values - small.pixel_values).max() < 3 / 127
    long = np.repeat(np.arange(600)[None, :, None] % 200, 10, 0).repeat(3, -1).astype(np.uint8)
    centre = long[:, 200:400]  # ten times as wide as what is seen
    wide, cut = (processor(image, return_tensors="np").pixel_values for image in (long, centre))
    assert np.abs(wide - cut).max() < 2 / 127


def test_a_video_passes_the_same_door(monkeypatch, serve, tmp_path):
    frames = np.zeros((9, 8, 8, 3), np.uint8)
    asked = []

    def load(path, sample_indices_fn):
        assert Path(path).read_bytes() == b"video"
        asked.append(sample_indices_fn(SimpleNamespace(total_num_frames=9, width=8, height=8)))
        return frames[asked[-1]], None

    monkeypatch.setattr(picture_sources, "load_video", load)
    path = tmp_path / "video.mp4"
    path.write_bytes(b"video")
    for source in (path, serve([header(5), b"video"]), "data:video/mp4;base64," + base64.b64encode(b"video").decode()):
        assert len(sample_frames(source, 3)) == 3
    assert asked == [[0, 4, 8]] * 3  # no more is decoded than is read
    with pytest.raises(ValueError, match=r'video ".*vide.*": it has 8 x 8 pixels, more than `max_pixels`'):
        sample_frames(path, 3, SourceLimits(max_pixels=9))
    with pytest.raises(ValueError, match=r'video "nowhere\.mp4": no such file'):
        sample_frames("nowhere.mp4", 3)
    with pytest.raises(ValueError, match="it has no frames"):
        sample_frames([], 3)
