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
EXCLUDED = frozenset(
    """monkey|guide dog|service dog|poodle|dog|cat|black cat|tiger|horse|ox|water buffalo|cow|pig|pig nose|boar|ewe
|two-hump camel|mouse|rat|rabbit|hamster|badger|rosette|wilted flower|leaf fluttering in wind|empty nest|white flower
|rooster|baby chick|front-facing baby chick|black bird|goose|dove|wing|dragon|spouting whale|lime|beans|egg|salt|ice
|sake|pouring liquid|teacup without handle|clinking glasses|tumbler glass|microbe|spider web|leafless tree|lotus
|light rail|train|tram|tram car|metro|high-speed train|railway car|oncoming bus|oncoming police car|oncoming taxi
|oncoming automobile|trolleybus|minibus|bus stop|monorail|mountain railway|stop sign|construction|railway track|motorway
|airplane departure|airplane arrival|small airplane|suspension railway|aerial tramway|seat|motorized wheelchair
|new moon|waxing crescent moon|first quarter moon|waxing gibbous moon|waning gibbous moon|last quarter moon
|waning crescent moon|new moon face|first quarter moon face|last quarter moon face|full moon face|sun with face|fog
|sun behind small cloud|sun behind large cloud|sun behind rain cloud|cloud with lightning and rain|wind face|cyclone
|milky way|umbrella|umbrella on ground|closed umbrella|snowman without snow|star|sparkles|sparkler|reminder ribbon
|2nd place medal|3rd place medal|softball|rugby football|heart suit|diamond suit|spade suit|club suit|field hockey
|admission tickets|long drum|pen|fountain pen|black nib|locked with pen|locked with key|unlocked|old key|white cane
|woman’s sandal|ballet shoes|briefs|shorts|one-piece swimsuit|flat shoe|clutch bag|handbag|goggles|prayer beads
|hammer and pick|hammer and wrench|broken chain|chains|link|pick|chopsticks|fork and knife|landslide|fish cake with swirl
|oden|stuffed flatbread|curry rice|cooked rice|rice cracker|spaghetti|takeout box|fondue|butter|mate|jar|amphora
|ship|ferry|motor boat|canoe|police car light|oil drum|manual wheelchair|card index|woman’s hat|lab coat|coat
|moon viewing ceremony|pine decoration|Japanese dolls|ticket|flower playing cards|joker|folding hand fan|sari|root vegetable
|roasted sweet potato|bowl with spoon|shallow pan of food|tamale|canned food|boomerang|fishing pole|lacrosse|comet
|slot machine|pool 8 ball|running shirt|hair pick|woman’s boot|hyacinth|auto rickshaw|articulated lorry|high voltage
|herb|shopping bags|military medal|chess pawn|skier|carp streamer|wind chime|horizontal traffic light|station|worm|mosquito|cockroach|fly|shamrock|thong sandal|bikini|socks|broken heart|sled|memo""".replace(
        "\n", ""
    ).split("|")
)
SIZES = (112, 125)
PLACE_JITTER = 2


@dataclass(frozen=True)
class EmojiSet:
    """Names and pictures: `pictures` uint8 `(n, 128, 128, 4)`, colour multiplied by alpha."""

    names: tuple[str, ...]
    pictures: np.ndarray


@lru_cache(maxsize=2)
def load_emoji(cache: str | Path | None = None) -> EmojiSet:
    """The chosen emoji, decoded (about three seconds the first time in a process)."""
    with tarfile.open(fetch(EMOJI_NAMES, cache)) as archive:
        entries = json.load(archive.extractfile("package/en/data.json"))
    wanted = {}
    for entry in entries:
        plain = entry.get("subgroup") in SUBGROUPS and "skins" not in entry and entry["label"] not in EXCLUDED
        if plain and "-200d-" not in entry["hexcode"].lower():
            # A picture's file name has the "show as emoji" mark wherever Unicode wants one, a hexcode only sometimes.
            code = entry["hexcode"].lower().removesuffix("-fe0f")
            for file in (f"{code}.webp", f"{code}-fe0f.webp"):
                wanted[f"package/assets/{file}"] = entry["label"].replace("’", "'").replace(":", "")
    pictures = {}
    with tarfile.open(fetch(FLUENT_EMOJI, cache)) as archive:
        for member in archive:
            if member.name in wanted:
                picture = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGBA").convert("RGBa")
                pictures[wanted[member.name]] = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
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


def compose(picture: np.ndarray, background: str, size: int = 120, shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Puts an RGBa picture, resized to `size`, on a plain background: uint8 `(128, 128, 3)`."""
    small = np.asarray(Image.fromarray(picture, "RGBa").resize((size, size), Image.Resampling.BILINEAR), np.float32)
    layer = np.zeros((SIDE, SIDE, 4), np.float32)
    top, left = (min(max((SIDE - size) // 2 + s, 0), SIDE - size) for s in shift)
    layer[top : top + size, left : left + size] = small
    paper = np.array(BACKGROUNDS[background], np.float32)
    return np.clip(layer[..., :3] + (1 - layer[..., 3:] / 255) * paper + 0.5, 0, 255).astype(np.uint8)


def sample_emoji(
    rng: np.random.Generator, emoji: EmojiSet, split: str = "train", name: str | None = None
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
    picture = compose(emoji.pictures[emoji.names.index(chosen)], background, size, shift)
    return emoji_caption(rng, chosen) + phrase, picture, chosen
