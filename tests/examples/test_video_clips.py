"""Which clips have motion of their own, and which frames are taken of them."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from transformers_nextflow.trainer import DataSource

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import data_formats
import video_clips

cv2 = pytest.importorskip("cv2", reason="OpenCV is optional")

RATE = 10
SCENE = np.full((480, 640, 3), 180, np.uint8)
for _x, _y, _w, _h, *_color in np.random.default_rng(0).integers(20, 60, (80, 7)) * [12, 9, 1, 1, 4, 4, 4]:
    cv2.rectangle(SCENE, (_x - 240, _y - 180), (_x - 240 + _w, _y - 180 + _h), [int(c) for c in _color], -1)


def frame(second: float, pan: float = 0, zoom: float = 1, turn: float = 0, walk: float | None = None) -> np.ndarray:
    """What a camera shows that pans (pixels a second), zooms and turns (degrees), and something that walks."""
    camera = cv2.getRotationMatrix2D((320, 240), turn * second, zoom**second)
    camera[:, 2] -= (160 + pan * second, 120 + pan * second / 2)
    picture = cv2.warpAffine(SCENE, camera, (320, 240))
    if walk is not None:
        left = 80 + round(walk * second)
        cv2.rectangle(picture, (left, 90), (left + 50, 150), (20, 20, 200), -1)
        cv2.circle(picture, (left + 25, 120), 12, (240, 240, 40), -1)
    noise = np.random.default_rng(round(second * 100)).normal(0, 2, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def write_clip(path: Path, seconds: float, **motion) -> bytes:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), RATE, (320, 240))
    for index in range(round(seconds * RATE)):
        writer.write(frame(index / RATE, **motion))
    writer.release()
    return path.read_bytes()


@pytest.mark.parametrize("motion", [{"pan": 20}, {"pan": 60}, {"zoom": 1.2}, {"turn": 10}, {"pan": 15, "zoom": 1.1}])
@pytest.mark.parametrize("walk", [None, 10, 40])
def test_cameras_and_walkers(motion, walk):
    first, second = (frame(second, **motion, walk=walk) for second in (0, 0.2))
    assert video_clips.describe_motion(first, second) == (True, walk is not None)
    still = [frame(second, walk=walk) for second in (0, 0.2)]
    assert video_clips.describe_motion(*still) == (walk is not None, walk is not None)


def test_frames_of_a_clip(tmp_path):
    clip = write_clip(tmp_path / "walk.mp4", 9, walk=15)
    frames = video_clips.choose_frames(clip, None, 5)
    assert len(frames) == 5 and len(video_clips.choose_frames("walk.mp4", str(tmp_path), 3)) == 3
    for index, picture in enumerate(frames):  # one in two seconds
        expected = cv2.cvtColor(frame(2.0 * index, walk=15), cv2.COLOR_BGR2RGB)
        assert np.abs(np.asarray(picture).astype(int) - expected).mean() < 12
    with pytest.raises(ValueError, match=r"has 1; it needs two"):
        video_clips.choose_frames(write_clip(tmp_path / "short.mp4", 1.5, walk=15), None, 5)
    with pytest.raises(ValueError, match="The clip is static"):
        video_clips.choose_frames(write_clip(tmp_path / "still.mp4", 2.5), None, 5)
    with pytest.raises(ValueError, match="only the camera moves"):
        video_clips.choose_frames(write_clip(tmp_path / "pan.mp4", 2.5, pan=20), None, 5)
    with pytest.raises(ValueError, match="can't be read as a video"):
        video_clips.choose_frames(b"no video", None, 5)
    with pytest.raises(ValueError, match=r"There is no clip .*none\.mp4"):
        video_clips.choose_frames("none.mp4", str(tmp_path), 5)


def test_raft_is_used_where_its_weights_are_given(tmp_path):
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    torch.save(raft_small().state_dict(), tmp_path / "raft.pth")
    video_clips.check_flow(str(tmp_path / "raft.pth"))
    first, second = frame(0, walk=40)[:128, :160], frame(0.2, walk=40)[:128, :160]
    flow = video_clips.dense_flow(first, second, str(tmp_path / "raft.pth"))
    assert flow.shape == (128, 160, 2) and not np.allclose(flow, video_clips.dense_flow(first, second, None))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth has no weights of torchvision's `raft_small`"):
        video_clips.check_flow(str(tmp_path / "other.pth"))


def test_a_clip_is_a_conversation(tmp_path):
    clip = write_clip(tmp_path / "walk.mp4", 2.5, walk=15)
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        for name, data in (("0.mp4", clip), ("0.json", b'{"caption": "it walks"}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = DataSource("video", "webdataset", str(tmp_path / "clips.tar"))
    (row,) = data_formats.read_rows(source, source.data)
    messages = data_formats.make_messages(row, source, data_formats.find_columns(source))
    assert messages[0] == {"role": "user", "content": "it walks"} and messages[1]["role"] == "assistant"
    assert [part["image"].size for part in messages[1]["content"]] == [(320, 240)] * 2
