"""Frames of video clips as arXiv 2601.02204 takes them: 0.5 a second, at most 5 (or 3), and only of clips in which
something moves by itself. Needs `pip install -e ".[video]"`.

Motion is told by optical flow between each frame and the picture 0.2 seconds later, at 256 pixels: RAFT where its
weights are given (`raft`: a state dict of torchvision's `raft_small`), else Farneback's. A clip is *static* if next to
nothing moves, and moved by the *camera only* if one affine map (pan, zoom, turn) explains what does. A camera that
travels through a scene moves near things more than far ones, which this takes for motion of their own.
"""

import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SECONDS_PER_FRAME = 2.0
FLOW_SECONDS = 0.2  # dense flow can't follow two seconds
FLOW_SIDE = 256  # pixels of the longer side
MOVES = 0.5  # pixels in FLOW_SECONDS, of FLOW_SIDE
SLACK = 0.1  # of the length of the camera's motion: what an affine map may miss
MOVING_SHARE = 0.02  # of what is seen well enough to tell


def choose_frames(clip: Any, folder: str | None, max_frames: int, raft: str | None = None) -> list[Image.Image]:
    """Frames of a clip (a name in a folder, bytes, or a dictionary of these).

    Raises:
        `ValueError`: if it can't be read, is too short for two frames, static, or moved by the camera only.
    """
    clip = clip.get("path") if isinstance(clip, dict) and clip.get("bytes") is None else clip
    clip = clip["bytes"] if isinstance(clip, dict) else clip
    if isinstance(clip, bytes):
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            file.write(clip)
            file.flush()
            pairs = read_pairs(file.name, max_frames)
    elif isinstance(clip, str):
        pairs = read_pairs(os.path.join(folder or "", clip), max_frames)
    else:
        raise ValueError("The row has no clip.")
    if len(pairs) < 2:
        raise ValueError(f"At a frame in {SECONDS_PER_FRAME:g} seconds the clip has {len(pairs)}; it needs two.")
    motions = [describe_motion(*pair, raft) for pair in pairs if pair[1] is not None]
    if not any(moving for moving, _ in motions):
        raise ValueError("The clip is static.")
    if not any(own for _, own in motions):
        raise ValueError("In the clip only the camera moves.")
    return [Image.fromarray(frame) for frame, _ in pairs]


def check_flow(raft: str | None) -> None:
    """Raises a `ValueError` unless what frames are chosen with is installed, and RAFT's weights are some."""
    if importlib.util.find_spec("cv2") is None:
        raise ValueError('clips need OpenCV, which is not installed: `pip install -e ".[video]"`.')
    if raft is not None:
        load_raft(raft)


def read_pairs(path: str, max_frames: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """RGB frames `(H, W, 3)` at the chosen times, each with the one that its motion is measured on, if there is one."""
    import cv2

    if not Path(path).is_file():
        raise ValueError(f"There is no clip {path}.")
    video = cv2.VideoCapture(path)
    try:
        rate = video.get(cv2.CAP_PROP_FPS)
        if not video.isOpened() or not rate > 0:
            raise ValueError(f"{path} can't be read as a video.")
        starts = [round(number * SECONDS_PER_FRAME * rate) for number in range(max_frames)]
        later = max(1, round(FLOW_SECONDS * rate))
        wanted = {*starts, *(start + later for start in starts)}
        frames: dict[int, np.ndarray] = {}
        for index in range(max(wanted) + 1):
            if not video.grab():
                break
            if index in wanted:
                frames[index] = cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
    finally:
        video.release()
    return [(frames[start], frames.get(start + later)) for start in starts if start in frames]


def describe_motion(first: np.ndarray, second: np.ndarray, raft: str | None = None) -> tuple[bool, bool]:
    """Whether anything moves from one RGB frame `(H, W, 3)` to the next, and whether anything moves by itself."""
    import cv2

    ratio = FLOW_SIDE / max(first.shape[:2])
    size = tuple(max(128, round(side * ratio / 8) * 8) for side in first.shape[1::-1])  # RAFT's sizes
    first, second = (cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in (first, second))
    gray = cv2.cvtColor(first, cv2.COLOR_RGB2GRAY)
    flow = dense_flow(first, second, raft)
    # Where it is plain nobody can tell what moves, nor at the borders, where things come in.
    corners = cv2.cornerMinEigenVal(gray, 9)
    seen = corners > max(1e-4, 0.02 * float(np.quantile(corners, 0.99)))
    margin = [side // 12 for side in gray.shape]
    inside = np.zeros_like(seen)
    inside[margin[0] : -margin[0], margin[1] : -margin[1]] = True
    rows, columns = np.nonzero(seen & inside)
    if len(rows) < 16:
        return False, False
    points = np.stack([columns, rows], axis=1).astype(np.float32)
    moved = flow[rows, columns].astype(np.float32)
    moving = np.linalg.norm(moved, axis=1) > MOVES
    if moving.mean() < MOVING_SHARE:
        return False, False
    # With the camera's motion undone, what still moves does so by itself.
    camera = fit_camera(points, moved)
    steady = cv2.warpAffine(second, camera, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    rest = np.linalg.norm(dense_flow(first, steady, raft)[rows, columns], axis=1)
    far = np.linalg.norm(np.abs(camera - np.eye(2, 3)) @ (*size, 1))
    own = rest > MOVES + SLACK * far
    return True, bool(own.mean() >= MOVING_SHARE)


def dense_flow(first: np.ndarray, second: np.ndarray, raft: str | None) -> np.ndarray:
    """Flow `(H, W, 2)` between two RGB frames, in pixels."""
    import cv2

    if raft is not None:
        return raft_flow(first, second, raft)
    gray, other = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second))
    return cv2.calcOpticalFlowFarneback(gray, other, None, 0.5, 4, 21, 3, 7, 1.5, 0)


def fit_camera(points: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """The affine map `(2, 3)` of points `(N, 2)` that explains most of their motion `(N, 2)`.

    Least squares, weighted anew by what is left over (Geman and McClure's weights).
    """
    basis = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    scale = np.ones(len(points))
    for width in (8.0, 4.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5):  # pixels
        solution = np.linalg.lstsq(basis * scale[:, None], moved * scale[:, None], rcond=None)[0]
        scale = 1 / (1 + ((moved - basis @ solution) ** 2).sum(1) / width**2)
    return np.eye(2, 3) + solution.T


@lru_cache(maxsize=1)
def load_raft(path: str) -> Any:
    """torchvision's small RAFT with the weights of a file."""
    import torch
    from torchvision.models.optical_flow import raft_small

    model = raft_small()
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:
        raise ValueError(f"{path} has no weights of torchvision's `raft_small`: {error}") from error
    return model.eval()


def raft_flow(first: np.ndarray, second: np.ndarray, path: str) -> np.ndarray:
    """Flow `(H, W, 2)` between two RGB frames, in pixels."""
    import torch

    frames = [torch.from_numpy(frame).permute(2, 0, 1)[None] / 127.5 - 1 for frame in (first, second)]
    with torch.no_grad():
        return load_raft(path)(*frames)[-1][0].permute(1, 2, 0).numpy()
