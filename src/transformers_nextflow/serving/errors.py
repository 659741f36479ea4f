"""Errors of the server in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any


class ApiError(Exception):
    """What went wrong, for a client. It pickles, since it comes from other processes.

    Args:
        message (`str`): What was wrong, what is legal and what to do.
        status (`int`, *optional*, defaults to 400): The HTTP status.
        param (`str`, *optional*): The field of the request.
        code (`str`, *optional*): A word for programs.
        retry_after (`int`, *optional*): Seconds, for the header `Retry-After`.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message, status, param, code, retry_after)
        self.message, self.status, self.param, self.code, self.retry_after = message, status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        # What clients sent, and is repeated here, may hold what UTF-8 can't.
        message, param = (text and text.encode("utf-8", "replace").decode() for text in (self.message, self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


__all__ = ["ApiError"]
