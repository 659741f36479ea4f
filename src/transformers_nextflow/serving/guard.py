"""What every request passes first: the key, and the limit on bytes. Plain ASGI, so that bodies are never held here."""

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException

from .errors import ApiError
from .settings import ServingSettings

OPEN_PATHS = ("/health",)  # for probes, which have no key


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: Any, settings: ServingSettings):
        self.app, self.key, self.max_bytes = app, settings.key, settings.max_body_bytes

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            if self.key is not None and scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self.max_bytes:
                raise self._too_large()
        except ApiError as error:
            body = json.dumps(error.body).encode()
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": error.status, "headers": head})
            await send({"type": "http.response.body", "body": body})
            return
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:  # it gave no length
                raise HTTPException(413, self._too_large().message)
            return message

        await self.app(scope, counted, send)

    def _check_key(self, header: bytes) -> None:
        scheme, _, given = header.partition(b" ")
        # In constant time, so that its answers do not tell how much of a key is right.
        right = hmac.compare_digest(given.strip(), (self.key or "").encode())
        if scheme.lower() != b"bearer" or not right:
            raise ApiError(
                "Wrong or missing API key: send the header `Authorization: Bearer KEY`.", 401, code="invalid_api_key"
            )

    def _too_large(self) -> ApiError:
        return ApiError(f"The request is larger than {self.max_bytes} bytes.", status=413, code="request_too_large")


__all__ = ["Guard"]
