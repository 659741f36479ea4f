"""Words: two to six capital letters in the DejaVu fonts that matplotlib ships; colour and place are in the caption."""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .shapes import BACKGROUNDS, COLOURS, SIDE, article, draw_background

_TRAIN = """
GO NO ON UP IN IT ME WE HI OK SO TO BY MY AT OX CAT DOG SUN SKY CAR BUS CUP HAT MAP KEY BOX BED PEN RED BIG TOP HOT
ICE JOY FUN FOX OWL BEE ANT COW PIG EGG TEA PIE JAM NUT ZOO GYM SPA BAR CAB VAN JET OAK SEA BAY AIR FOG WEB APP BIT
LAB ART INK WIN YES NEW OLD OUT OFF BOOK STAR MOON TREE BIRD FISH FROG BEAR LION WOLF DUCK GOAT CAKE MILK RICE SOUP
SALT CORN PLUM PEAR LIME KIWI RAIN SNOW WIND FIRE WAVE ROCK SAND HILL LAKE PARK ROAD CITY TOWN HOME DOOR WALL ROOF
DESK LAMP SOFA BATH SHOP BANK CAFE MENU SALE OPEN STOP EXIT TAXI SHIP BOAT BIKE GOLF BALL GAME PLAY DRUM SONG JAZZ
LOVE HOPE WISH GOLD BLUE PINK GRAY CODE DATA FILE APPLE BREAD LEMON MANGO GRAPE PEACH MELON OLIVE PIZZA PASTA SALAD
SUGAR HONEY WATER JUICE COCOA TIGER ZEBRA HORSE SHEEP MOUSE SNAKE WHALE SHARK EAGLE ROBIN GOOSE RIVER OCEAN BEACH
CLOUD STORM EARTH PLANT GRASS HOUSE TABLE CHAIR CLOCK PHONE RADIO MUSIC PIANO DANCE PAINT LIGHT NIGHT SMILE DREAM
HEART PEACE WORLD TRAIN PLANE TRUCK GREEN WHITE BLACK BROWN SWEET ORANGE BANANA CHERRY TOMATO POTATO CARROT GARLIC
BUTTER CHEESE COFFEE COOKIE DINNER RABBIT MONKEY TURTLE PARROT DONKEY SPIDER BEETLE GARDEN FOREST DESERT ISLAND VALLEY
BRIDGE STREET MARKET SCHOOL OFFICE WINDOW MIRROR CAMERA GUITAR VIOLIN ROCKET PLANET SUMMER WINTER SPRING AUTUMN SUNDAY
MONDAY FRIDAY FAMILY FRIEND YELLOW PURPLE SILVER
"""
_HELD_OUT = """
DO US AM HE RAT HEN TOY BAG SIT RUN ARM LEG WET SEED LEAF NEST RING KITE COAT SHOE HAND FOOT TEAM NEWS TIME STONE
CRANE BERRY TOAST SHIRT MONEY PAPER PLATE TOWER CANDLE BASKET POCKET LETTER DOCTOR FARMER SINGER
"""
TRAIN_WORDS = tuple(_TRAIN.split())
HELD_OUT_WORDS = tuple(_HELD_OUT.split())
# The caption names every font but the first.
FONTS = {"": "DejaVuSans-Bold.ttf", "serif": "DejaVuSerif-Bold.ttf", "mono": "DejaVuSansMono-Bold.ttf"}
FONT_WEIGHTS = (0.7, 0.15, 0.15)
# Yellow letters are hardly legible on most of the backgrounds.
LETTER_COLOURS = tuple(colour for colour in COLOURS if colour != "yellow")
PLACES = {"": 64, "at the top": 36, "at the bottom": 92}
PLACE_WEIGHTS = (0.7, 0.15, 0.15)
WIDTH = 114
# Capital letters are drawn this high at most, and stretched to be at least this high: two cells of a 16-pixel stride.
HEIGHTS = (36, 54)
SIZE_JITTER = 0.04
PLACE_JITTER = 2


@dataclass(frozen=True)
class Lettering:
    """A caption and all that is needed to draw and to judge it: `height` is that of the capitals, `cy` their middle."""

    caption: str
    word: str
    colour: str
    background: str
    font: str
    cy: int
    height: int
    width: int


def sample_word(rng: np.random.Generator, split: str = "train") -> Lettering:
    """Draws a word of `TRAIN_WORDS` (`split` "train" or "test") or of `HELD_OUT_WORDS` ("heldout")."""
    lists = {"train": TRAIN_WORDS, "test": TRAIN_WORDS, "heldout": HELD_OUT_WORDS}
    if split not in lists:
        raise ValueError(f"`split` must be one of {tuple(lists)}, but got {split!r}.")
    word, colour = str(rng.choice(lists[split])), str(rng.choice(LETTER_COLOURS))
    font, place = str(rng.choice(list(FONTS), p=FONT_WEIGHTS)), str(rng.choice(list(PLACES), p=PLACE_WEIGHTS))
    background, phrase = draw_background(rng)
    form = str(rng.choice(['the word "{}" in {}', 'the word "{}" in {}', 'a sign that says "{}" in {}']))
    in_font = f" in {article(font)} font" if font else ""
    caption = form.format(word, colour) + in_font + (f" {place}" if place else "") + phrase
    left, top, right, bottom = _ink(word, font)
    scale = min(WIDTH / (right - left), HEIGHTS[1] / (bottom - top)) * rng.uniform(1 - 2 * SIZE_JITTER, 1)
    height = max(round((bottom - top) * scale), HEIGHTS[0])
    cy = PLACES[place] + int(rng.integers(-PLACE_JITTER, PLACE_JITTER + 1))
    return Lettering(caption, word, colour, background, font, cy, height, round((right - left) * scale))


def render_word(lettering: Lettering, zoom: int = 1) -> np.ndarray:
    """Draws a word: uint8 `(128 * zoom, 128 * zoom, 3)`, centred on x, anti-aliased, deterministic."""
    left, top, right, bottom = _ink(lettering.word, lettering.font)
    ink = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(ink).text((-left, -top), lettering.word, fill=255, font=_font(lettering.font))
    width, height, side = lettering.width * zoom, lettering.height * zoom, SIDE * zoom
    mask = np.asarray(ink.resize((width, height), Image.Resampling.BOX), np.float32)[..., None] / 255
    image = np.empty((side, side, 3), np.float32)
    image[:] = BACKGROUNDS[lettering.background]
    y, x = lettering.cy * zoom - height // 2, (side - width) // 2
    window = image[y : y + height, x : x + width]
    window += mask * (np.array(COLOURS[lettering.colour], np.float32) - window)
    return np.round(image).astype(np.uint8)


@lru_cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    import matplotlib  # only for its fonts

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / FONTS[name]), 200)


@lru_cache(maxsize=4096)
def _ink(word: str, font: str) -> tuple[int, int, int, int]:
    """Box of a word's ink at the font's drawing size: left, top, right, bottom."""
    left, top, right, bottom = _font(font).getbbox(word)
    return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
