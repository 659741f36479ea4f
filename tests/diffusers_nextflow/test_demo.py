"""The page: what it does without a browser, and the page itself in one."""

import io
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_nextflow import NextFlowPipeline
from diffusers_nextflow.demo import MAX_CHATS, Studio, build_page, load_studio, look, main, read_strokes

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from tiny_world.detector import detect_objects

PICTURE = Image.new("RGB", (80, 80), "skyblue")


@pytest.fixture(scope="module")
def studio(tiny_random_checkpoint):
    pipe = NextFlowPipeline.from_pretrained(tiny_random_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pipe.model.config.max_position_embeddings = 2048
    return Studio(pipe)


def last(chunks):
    return list(chunks)[-1].value


def test_it_draws_what_the_pipeline_draws_with_a_preview_for_every_scale(studio):
    chunks = list(studio.draw("a", guidance_scale=2.0, seed=3))
    assert [chunk.kind for chunk in chunks] == ["preview"] * 4 + ["image"]

    def wanted(*args, **kwargs):
        generator = torch.Generator().manual_seed(3)
        return studio.pipe(*args, guidance_scale=2.0, generator=generator, **kwargs).images

    assert chunks[-1].value == wanted("a")[0]
    edited = last(studio.draw("b", [PICTURE], guidance_scale=2.0, seed=3))
    assert edited == wanted("b", image=PICTURE)[0]
    story = [
        chunk.value for chunk in studio.draw("c", guidance_scale=2.0, seed=3, num_frames=2) if chunk.kind == "image"
    ]
    assert story == wanted("c", num_frames=2)


def test_what_is_painted_over_is_drawn_and_the_rest_stays(studio):
    layer = Image.new("RGBA", (80, 80), (0, 0, 0, 0))
    assert read_strokes({"background": PICTURE, "layers": [layer]}) is None
    layer.paste((224, 33, 138, 9), (20, 30, 70, 80))  # a brush has soft edges
    mask = read_strokes({"background": PICTURE, "layers": [layer]})
    assert mask.getbbox() == (20, 30, 70, 80) and mask.getcolors() == [(3900, 0), (2500, 255)]
    for image_in_prompt in (True, False):
        given = {"image_in_prompt": image_in_prompt, "guidance_scale": 2.0}
        generator = torch.Generator().manual_seed(3)
        wanted = studio.pipe("b", image=PICTURE, mask_image=mask, generator=generator, **given).images[0]
        assert last(studio.draw("b", [PICTURE], seed=3, mask=mask, **given)) == wanted


def test_all_aspects_are_to_be_had(studio):
    sizes = studio.sizes()
    assert len(sizes) == len({value for _, value in sizes}) == 41 and sizes[0] == ("1:1 · 80 x 80", "16x16")
    for label, value in sizes[::8]:
        assert label.endswith("{} x {}".format(*last(studio.draw("a", size=value)).size))


def test_chats_are_of_a_page_each_and_end_some_time(studio):
    options = {"guidance_scale": 1.0}
    first = last(studio.say("one", "a", None, "image", generator=torch.Generator().manual_seed(0), **options))
    assert first.size == (80, 80) and studio._chats["one"].num_turns == 1
    last(studio.say("one", "b", [PICTURE], "interleaved", max_new_tokens=2, max_new_images=0))
    assert studio._chats["one"].num_turns == 2
    for number in range(MAX_CHATS):
        studio._chats[f"other {number}"] = studio._chats["one"]
    last(studio.say("two", "a", None, "image", **options))
    assert "one" not in studio._chats and len(studio._chats) == MAX_CHATS
    studio.forget("two")
    assert "two" not in studio._chats
    studio._chats.clear()


def test_what_is_missing_is_said(studio, capsys):
    for call in (lambda: studio.draw(" "), lambda: studio.ask(None, "?"), lambda: studio.say("x", "", None, "image")):
        with pytest.raises(ValueError, match=r"Say|Show"):
            list(call())
    assert main(["--model", "/no/such/folder"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m diffusers_nextflow.demo: error:") and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # gradio's own
def test_the_page_in_a_browser():
    """A prompt is typed, previews change, the picture is right, and is edited; on a desktop and on a phone.

    With the environment variable SCREENSHOTS the pictures of the page are written to that folder.
    """
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    studio, masks = load_studio(device="cpu"), []
    draw = studio.draw
    studio.draw = lambda *args, **kwargs: masks.append(kwargs.get("mask")) or draw(*args, **kwargs)
    page = build_page(studio)
    page.queue(default_concurrency_limit=1)
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **look())
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=options)
            for name, width, height in (("desktop", 1280, 900), ("phone", 390, 844)):
                view = browser.new_page(viewport={"width": width, "height": height})
                view.set_default_timeout(240_000)
                hosts = set()
                view.on("request", lambda request, hosts=hosts: hosts.add(request.url.split("/")[2]))
                view.goto(f"http://127.0.0.1:{port}/")
                view.fill("#prompt textarea", "a red circle left of a blue square")
                view.uncheck("text=a new one each time >> nth=0")
                view.click("#draw")
                shown = watch(view, "drawn")
                assert len(shown) >= 3  # of seven previews, those that the browser was quick enough to show
                found = {(thing.name, thing.colour) for thing in detect_objects(fetch(view, shown[-1]))}
                assert {("circle", "red"), ("square", "blue")} <= found
                shoot(view, f"{name}.png")
                view.click("#to-edit")
                view.click("role=tab[name=Edit]")
                paint(view)
                view.click("#edit")
                fetch(view, watch(view, "edited")[-1])
                assert masks[0] is None and [masks[-1].getpixel(at) for at in ((40, 60), (120, 120))] == [255, 0]
                shoot(view, f"{name}_edit.png")
                assert not view.evaluate("document.documentElement.scrollWidth > innerWidth")
                assert hosts <= {f"127.0.0.1:{port}", ""}  # "" of data URIs
                view.close()
            browser.close()
    finally:
        page.close()


def watch(view, name):
    """The addresses of the pictures that an element shows until the last is there."""
    shown = []
    find = f"() => (document.querySelector('#{name} img') || {{src: ''}}).src"
    while "seed" not in view.inner_text(f"#{name}-status"):
        shown.append(view.evaluate(find))
        view.wait_for_timeout(20)
    view.wait_for_timeout(500)
    shown.append(view.evaluate(find))
    return list(dict.fromkeys(filter(None, shown)))


def paint(view):
    """A stroke over the left half of the picture that is to be edited."""
    canvas = view.wait_for_selector("#source canvas")
    view.wait_for_timeout(1000)
    box = canvas.bounding_box()
    x, y, side = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, min(box["width"], box["height"])
    view.mouse.move(x - 0.2 * side, y - 0.08 * side)
    view.mouse.down()
    for step in range(8):
        view.mouse.move(x - (0.2 - 0.01 * step) * side, y - (0.08 - 0.02 * step) * side)
    view.mouse.up()
    view.wait_for_timeout(500)


def fetch(view, address):
    image = Image.open(io.BytesIO(view.request.get(address).body())).convert("RGB")
    assert image.size == (128, 128)
    return image


def shoot(view, name):
    if folder := os.environ.get("SCREENSHOTS"):
        view.screenshot(path=Path(folder) / name, full_page=True)
