"""Emoji: Microsoft's Fluent 3D emoji on plain backgrounds, captioned with their Unicode names."""

import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .fetch import EMOJI_NAMES, FLUENT_EMOJI, fetch
from .shapes import BACKGROUNDS, SIDE, TEST_FRACTION, article, draw_background

# CLDR subgroups with things that a 128-pixel picture shows well: animals and plants (34-41), food and drink (42-48),
# vehicles (54-56), sky (59), festivities, sports and games (60-63), clothes (65), instruments (68), and some objects.
SUBGROUPS = (*range(34, 49), 54, 55, 56, 59, 60, 61, 62, 63, 65, 68, 75, 77, 78)
# Near-duplicates of another one, mostly white or empty pictures, and names that say too little.
_EXCLUDED = """
2nd place medal|3rd place medal|Japanese dolls|admission tickets|aerial tramway|airplane arrival|airplane departure|
amphora|articulated lorry|auto rickshaw|baby chick|badger|ballet shoes|beans|bikini|black bird|black cat|black nib|
boar|boomerang|bowl with spoon|briefs|broken chain|broken heart|bus stop|butter|canned food|canoe|card index|
carp streamer|cat|chains|chess pawn|chopsticks|clinking glasses|closed umbrella|cloud with lightning and rain|
club suit|clutch bag|coat|cockroach|comet|construction|cooked rice|cow|curry rice|cyclone|diamond suit|dog|dove|
dragon|egg|empty nest|ewe|ferry|field hockey|first quarter moon|first quarter moon face|fish cake with swirl|
fishing pole|flat shoe|flower playing cards|fly|fog|folding hand fan|fondue|fork and knife|fountain pen|
front-facing baby chick|full moon face|goggles|goose|guide dog|hair pick|hammer and pick|hammer and wrench|hamster|
handbag|heart suit|herb|high voltage|high-speed train|horizontal traffic light|horse|hyacinth|ice|jar|joker|lab coat|
lacrosse|landslide|last quarter moon|last quarter moon face|leaf fluttering in wind|leafless tree|light rail|lime|
link|locked with key|locked with pen|long drum|lotus|manual wheelchair|mate|memo|metro|microbe|military medal|
milky way|minibus|monkey|monorail|moon viewing ceremony|mosquito|motor boat|motorized wheelchair|motorway|
mountain railway|mouse|new moon|new moon face|oden|oil drum|old key|oncoming automobile|oncoming bus|
oncoming police car|oncoming taxi|one-piece swimsuit|ox|pen|pick|pig|pig nose|pine decoration|police car light|
poodle|pool 8 ball|pouring liquid|prayer beads|rabbit|railway car|railway track|rat|reminder ribbon|rice cracker|
roasted sweet potato|rooster|root vegetable|rosette|rugby football|running shirt|sake|salt|sari|seat|service dog|
shallow pan of food|shamrock|ship|shopping bags|shorts|skier|sled|slot machine|small airplane|snowman without snow|
socks|softball|spade suit|spaghetti|sparkler|sparkles|spider web|spouting whale|star|station|stop sign|
stuffed flatbread|sun behind large cloud|sun behind rain cloud|sun behind small cloud|sun with face|
suspension railway|takeout box|tamale|teacup without handle|thong sandal|ticket|tiger|train|tram|tram car|trolleybus|
tumbler glass|two-hump camel|umbrella|umbrella on ground|unlocked|waning crescent moon|waning gibbous moon|
water buffalo|waxing crescent moon|waxing gibbous moon|white cane|white flower|wilted flower|wind chime|wind face|
wing|woman's boot|woman's hat|woman's sandal|worm
"""
EXCLUDED = frozenset(_EXCLUDED.replace("\n", "").split("|"))
SIZES = (112, 125)
PLACE_JITTER = 2


@dataclass(frozen=True)
class EmojiSet:
    """Names and pictures: `pictures` uint8 `(n, 128, 128, 4)`, colour multiplied by alpha."""

    names: tuple[str, ...]
    pictures: np.ndarray


@lru_cache(maxsize=2)
def load_emoji(cache: str | Path | None = None, zoom: int = 1) -> EmojiSet:
    """The chosen emoji at 128 or more pixels, decoded (about three seconds the first time in a process)."""
    with tarfile.open(fetch(EMOJI_NAMES, cache)) as archive:
        entries = json.load(archive.extractfile("package/en/data.json"))
    wanted = {}
    for entry in entries:
        name = entry["label"].replace("\u2019", "'").replace(":", "")
        plain = entry.get("subgroup") in SUBGROUPS and "skins" not in entry and name not in EXCLUDED
        if plain and "-200d-" not in entry["hexcode"].lower():
            # A picture's file name has the "show as emoji" mark wherever Unicode wants one, a hexcode only sometimes.
            code = entry["hexcode"].lower().removesuffix("-fe0f")
            for file in (f"{code}.webp", f"{code}-fe0f.webp"):
                wanted[f"package/assets/{file}"] = name
    pictures = {}
    with tarfile.open(fetch(FLUENT_EMOJI, cache)) as archive:
        for member in archive:
            if member.name in wanted:
                picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA").convert("RGBa")
                pictures[wanted[member.name]] = np.asarray(picture.resize((SIDE * zoom,) * 2, Image.Resampling.LANCZOS))
    names = tuple(sorted(pictures))
    return EmojiSet(names, np.stack([pictures[name] for name in names]))


def emoji_caption(rng: np.random.Generator, name: str) -> str:
    """One of the phrasings of a name."""
    plural = name.endswith("s") and not name.endswith(("ss", "us", "os"))
    forms = (
        f"{article(name)} emoji",
        f"{name} emoji",
        f"an emoji of {name if plural else article(name)}",
        f"a picture of {article(name)} emoji",
    )
    return str(rng.choice(forms))


def compose(
    picture: np.ndarray, background: str, size: int = 120, shift: tuple[int, int] = (0, 0), zoom: int = 1
) -> np.ndarray:
    """Puts an RGBa picture, resized to `size * zoom`, on a plain background: uint8 `(128 * zoom, 128 * zoom, 3)`."""
    size, side = size * zoom, SIDE * zoom
    small = np.asarray(Image.fromarray(picture, "RGBa").resize((size, size), Image.Resampling.BILINEAR), np.float32)
    layer = np.zeros((side, side, 4), np.float32)
    top, left = (min(max((side - size) // 2 + s * zoom, 0), side - size) for s in shift)
    layer[top : top + size, left : left + size] = small
    paper = np.array(BACKGROUNDS[background], np.float32)
    return np.clip(layer[..., :3] + (1 - layer[..., 3:] / 255) * paper + 0.5, 0, 255).astype(np.uint8)


def sample_emoji(
    rng: np.random.Generator, emoji: EmojiSet, split: str = "train", name: str | None = None, zoom: int = 1
) -> tuple[str, np.ndarray, str]:
    """Draws `(caption, picture, name)`. Some (name, background) pairs are kept for `split="test"`."""
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', but got {split!r}.")
    while True:
        chosen = name or emoji.names[rng.integers(len(emoji.names))]
        background, phrase = draw_background(rng)
        kept = zlib.crc32(f"{chosen}|{background}".encode()) % TEST_FRACTION == 0
        if background == "white" or kept == (split == "test"):
            break
    size = int(rng.integers(SIZES[0], SIZES[1] + 1))
    shift = tuple(int(s) for s in rng.integers(-PLACE_JITTER, PLACE_JITTER + 1, size=2))
    picture = compose(emoji.pictures[emoji.names.index(chosen)], background, size, shift, zoom)
    return emoji_caption(rng, chosen) + phrase, picture, chosen
