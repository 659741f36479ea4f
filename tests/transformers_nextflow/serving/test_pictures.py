"""Pictures from clients and from the web: within limits, from public addresses alone."""

import http.server
import io
import pickle
import socket
import ssl
import subprocess
import threading

import pytest
import torch
from PIL import ExifTags, Image
from server_pictures import mask_of, png_of, uri_of

from transformers_nextflow.image_processing_pil_nextflow import NextFlowImageProcessorPil
from transformers_nextflow.serving import ApiError
from transformers_nextflow.serving.pictures import download, fetch_picture, is_public, read_mask, read_picture

PICTURE = Image.new("RGB", (80, 80), "red")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_uploads_are_what_they_show(settings, kind):
    """Turned as their camera was held, and on white where they are transparent: what the image processor sees."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.effect_noise((96, 64), 90).quantize(8)
    options = {"PNG": {"transparency": 3, "exif": exif}, "GIF": {"transparency": 3}}.get(kind, {"exif": exif})
    (picture if kind in ("PNG", "GIF") else picture.convert("RGB")).save(buffer, kind, **options)
    process = NextFlowImageProcessorPil(num_scales=5)
    sent = pickle.loads(pickle.dumps(read_picture(buffer.getvalue(), settings(), "x")))  # to a replica
    wanted = process(Image.open(buffer), return_tensors="pt").pixel_values
    assert torch.equal(process(sent, return_tensors="pt").pixel_values, wanted)


def test_a_mask_is_where_all_is_transparent(settings):
    holes = Image.new("L", (80, 60), 0)
    holes.paste(255, (10, 20, 40, 50))
    half = mask_of(holes)
    half.putpixel((0, 0), (1, 2, 3, 1))  # nearly transparent is not
    palette = Image.new("P", (80, 60), 1)
    palette.paste(0, (10, 20, 40, 50))
    palette.info["transparency"] = 0
    for mask in (mask_of(holes), half, mask_of(holes).convert("LA"), palette):
        assert read_mask(png_of(mask), settings()).tobytes() == holes.tobytes()


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        *((address, False) for address in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0")),
        *(
            (address, False)
            for address in ("::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "224.0.0.1")
        ),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_urls_are_fetched_where_they_are_allowed_and_then_from_public_hosts(settings, monkeypatch):
    with pytest.raises(ApiError, match="fetches no URLs"):
        fetch_picture("https://example.com/a.png", settings(), "x")
    asked = []

    def resolve(host, port, **kwargs):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("8.8.8.8", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", None)  # nothing is connected to
    for url in ("http://example.com/a.png", "ftp://a/b", "https://user:pass@a/b", "https:///a", "file:///etc/passwd"):
        with pytest.raises(ApiError, match="https URL"):
            fetch_picture(url, settings(allow_urls=True), "x")
    assert not asked
    with pytest.raises(ApiError, match="public address"):  # one of its addresses is not
        fetch_picture("https://example.com/a.png", settings(allow_urls=True), "x")


@pytest.fixture
def web(tmp_path):
    """An https server on this machine; `(url, context)`."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("openssl makes no certificate here")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "https://localhost/a.png")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png_of(PICTURE) if self.path == "/a.png?b=1" else bytes(500_000))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}", ssl.create_default_context(cafile=str(certificate))
    server.shutdown()
    server.server_close()


def test_a_download_is_whole_bounded_and_goes_nowhere_else(web):
    url, context = web

    def get(path, limit=100_000):
        return download(url + path, limit, allowed=lambda address: address in ("127.0.0.1", "::1"), context=context)

    assert get("/a.png?b=1") == png_of(PICTURE)
    with pytest.raises(ValueError, match="redirects"):
        get("/away")
    with pytest.raises(ValueError, match="more than"):
        get("/large")
    with pytest.raises(ssl.SSLError):  # nobody vouches for the certificate
        download(url + "/a.png", 1000, allowed=lambda address: True)


def test_uploads_are_read_within_limits(settings):
    assert read_picture(png_of(PICTURE), settings(), "image").tobytes() == PICTURE.tobytes()
    assert fetch_picture(uri_of(PICTURE), settings(), "image").size == (80, 80)
    with pytest.raises(ApiError, match="max_pixels") as error:
        read_picture(png_of(PICTURE), settings(max_pixels=6399), "image")
    assert (error.value.status, error.value.param) == (400, "image")
