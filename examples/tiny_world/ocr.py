"""Two readers that judge rendered words: rapidocr (PyPI ships its models) and, where installed, tesseract."""

import io
import shutil
import subprocess
from functools import lru_cache

import numpy as np
from PIL import Image

# rapidocr sees a false digit on pictures without text; real words score far above this.
MIN_SCORE = 0.6
# Tesseract expects capitals some 30 pixels high on a page with margins.
TESSERACT_UPSAMPLING = 2


def read_with_rapidocr(image: np.ndarray) -> str:
    """The text of a picture, uint8 RGB `(H, W, 3)`, in upper case, pieces joined by a space; "" for none."""
    # Its three flags are sticky: a call that leaves one out gets the last call's.
    result = _rapidocr()(np.ascontiguousarray(image[..., ::-1]), use_det=True, use_cls=False, use_rec=True)
    texts, scores = getattr(result, "txts", None) or (), getattr(result, "scores", None) or ()
    return " ".join(text for text, score in zip(texts, scores, strict=True) if score >= MIN_SCORE).strip().upper()


def has_tesseract() -> bool:
    """Whether the `tesseract` command is installed."""
    return shutil.which("tesseract") is not None


def read_with_tesseract(image: np.ndarray) -> str:
    """The text of a picture, uint8 RGB `(H, W, 3)`, read as one line of capital letters; "" for none.

    Raises:
        `RuntimeError`: if tesseract fails.
    """
    gray = Image.fromarray(_to_ink(image))
    gray = gray.resize(
        (gray.width * TESSERACT_UPSAMPLING, gray.height * TESSERACT_UPSAMPLING), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    gray.save(buffer, "PNG")
    letters = "tessedit_char_whitelist=ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    command = ["tesseract", "stdin", "stdout", "--psm", "7", "-l", "eng", "-c", letters]
    done = subprocess.run(command, input=buffer.getvalue(), capture_output=True, env={"OMP_THREAD_LIMIT": "1"})
    if done.returncode:
        raise RuntimeError(f"tesseract failed: {done.stderr.decode().strip()}")
    return done.stdout.decode().strip().upper()


def _to_ink(image: np.ndarray) -> np.ndarray:
    """Black letters on white, whatever their colours: distance from the frame's colour, cropped to the ink's rows."""
    frame = np.concatenate([image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3)])
    distance = np.linalg.norm(image.astype(np.float32) - np.median(frame, axis=0), axis=-1)
    ink = 255 - np.clip(distance / max(np.quantile(distance, 0.98), 30) * 255, 0, 255)
    rows = np.flatnonzero((ink < 128).any(1))
    if len(rows):
        ink = ink[max(rows[0] - 12, 0) : rows[-1] + 13]
    return np.pad(ink, 12, constant_values=255).astype(np.uint8)


@lru_cache
def _rapidocr():
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    return RapidOCR(params={"Global.log_level": "error", **threads})
