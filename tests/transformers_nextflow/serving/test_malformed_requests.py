"""Whatever is sent, the answer is a status of 4xx in OpenAI's shape: two hundred requests that are wrong."""

import io
import json
import random
import zlib

from PIL import Image
from server_pictures import png_of, uri_of

PICTURE = Image.new("RGB", (80, 80), "red")
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
RIGHT = {
    GENERATIONS: {"prompt": "a"},
    CHAT: {"messages": [{"role": "user", "content": "a"}]},
    RESPONSES: {"input": "a"},
}
# What no field takes that has another type.
JUNK = [{}, {"a": 1}, [], [[]], True, -1, 2**80, 1e308, "", "\ud800", "x" * 50_000, "../../etc/passwd", [None]]
FIELDS = {
    GENERATIONS: "prompt n size quality background output_format output_compression model partial_images seed "
    "guidance_scale image_top_k image_top_p stream response_format",
    CHAT: "messages max_tokens temperature top_p modalities stop thinking size model n",
    RESPONSES: "input previous_response_id tools tool_choice max_output_tokens store model",
}
# Values that are right after all.
LEGAL = {(field, "../../etc/passwd") for field in ("prompt", "input", "stop")}


def png_bomb() -> bytes:
    """A picture of 60000 x 60000 pixels in a few kilobytes."""

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    size = (60_000).to_bytes(4, "big")
    lines = zlib.compress(bytes(7501) * 500)
    head = chunk(b"IHDR", size + size + bytes([1, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def bodies():
    """Requests as (path, bytes, headers)."""
    as_json = {"Content-Type": "application/json"}
    for path, right in RIGHT.items():
        for field in FIELDS[path].split():
            for value in JUNK:
                if value is True and field in ("stream", "store", "thinking"):
                    continue
                if isinstance(value, str) and (field, value) in LEGAL:
                    continue
                yield path, json.dumps({**right, field: value}).encode(), as_json
        for unknown in ("unknown", "\ud800", "x" * 10_000, ""):
            yield path, json.dumps({**right, unknown: 1}).encode(), as_json
        yield path, b"{}", as_json
        for broken in (b"", b"{", b"null", b'"text"', b"[1]", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100_000):
            yield path, broken, as_json
        yield path, json.dumps(right).encode(), {"Content-Type": "text/plain"}
        yield path, b" " * 3_000_000, as_json
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    urls = ["file:///etc/passwd", "http://127.0.0.1/", "data:image/png;base64,AAAA", "data:image/png,x", "data:"]
    for url in ["https://example.com/a.png", "", *urls]:
        part = {**picture, "image_url": {"url": url}}
        yield CHAT, json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode(), as_json
    for message in (
        {"role": "tool", "content": "a"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": uri_of(PICTURE)}}]},
        {"role": "system", "content": [{"type": "image_url", "image_url": {"url": uri_of(PICTURE)}}]},
    ):
        yield CHAT, json.dumps({"messages": [message]}).encode(), as_json
    yield from forms()


def form(*parts: tuple[str, bytes], boundary: bytes = b"X") -> bytes:
    lead = b"--X\r\nContent-Disposition: form-data; "
    body = b"".join(lead + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    return body + b"--" + boundary + b"--\r\n"


def forms():
    head = {"Content-Type": "multipart/form-data; boundary=X"}
    prompt, file = ('name="prompt"', b"a"), 'name="image"; filename="a.png"'
    right, buffer = png_of(PICTURE), io.BytesIO()
    PICTURE.save(buffer, "TIFF")
    draw = random.Random(0)
    damaged = [bytes(b if draw.random() > 0.05 else draw.randrange(256) for b in right[:100]) for _ in range(20)]
    for data in (b"", b"GIF89a", b"no picture", right[: len(right) // 2], png_bomb(), buffer.getvalue(), *damaged):
        yield EDITS, form((file, data), prompt), head
    yield EDITS, form(prompt), head
    yield EDITS, form((file, right)), head
    yield EDITS, form(prompt, ('name="image"', b"text")), head
    yield EDITS, form(prompt, (file, right), ('name="mask"; filename="m.png"', right)), head
    yield EDITS, form(prompt, (file, right), ('name="mask"', b"text")), head
    yield EDITS, form(prompt, (file, right), ('name="mask"; filename="m.png"', png_bomb())), head
    yield EDITS, form(prompt, prompt, (file, right)), head
    yield EDITS, form(*[(file, right)] * 12, prompt), head
    yield EDITS, form(prompt, (file, right), *[(f'name="f{number}"', b"") for number in range(100)]), head
    for name, value in {"n": "x", "seed": "-1", "size": "9x9", "stream": "perhaps", "guidance_scale": "nan"}.items():
        yield EDITS, form(prompt, (file, right), (f'name="{name}"', value.encode())), head
    yield EDITS, form(prompt, (file, right))[:-30], head
    yield EDITS, form(prompt, (file, right), boundary=b"Y"), head
    yield EDITS, b"\r\n--X--\r\n", head
    yield EDITS, b"", {"Content-Type": "multipart/form-data"}
    yield EDITS, b"{}", {"Content-Type": "application/json"}


def test_all_of_them_are_refused(talk):
    requests = list(bodies())
    assert len(requests) >= 200

    async def send(client, http):
        wrong = []
        for path, body, headers in requests:
            answer = await http.post(path, content=body, headers=headers)
            is_json = answer.headers.get("content-type", "") == "application/json"
            error = (is_json and answer.json().get("error")) or {}
            shape = {"message", "type", "param", "code"} == set(error) and error["type"] == "invalid_request_error"
            if not (400 <= answer.status_code < 500 and shape and error["message"]):
                wrong.append((path, body[:200], answer.status_code, answer.text[:200]))
        others = [await http.get(GENERATIONS), await http.post("/v1/nothing"), await http.delete(CHAT)]
        return wrong, [(answer.status_code, set(answer.json()["error"])) for answer in others]

    wrong, others = talk(send, max_body_bytes=2_000_000)
    assert not wrong, "\n".join(map(str, wrong))
    shape = {"message", "type", "param", "code"}
    assert others == [(405, shape), (404, shape), (405, shape)]


def test_a_body_without_a_length_is_counted(talk):
    async def pieces():
        for _ in range(40):
            yield b" " * 100_000

    async def send(client, http):
        headers = {"Content-Type": "application/json"}
        return (await http.post(CHAT, content=pieces(), headers=headers)).status_code

    assert talk(send, max_body_bytes=1_000_000) == 413
