"""Reads a request's body within limits, before anything looks at it."""

from __future__ import annotations

from starlette.requests import Request

from cluster.api.errors import BodyTooLargeError, UnsupportedMediaTypeError


async def read_json_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request that says that it is JSON.

    The limit holds while reading, whatever ``Content-Length`` says or does not say. The media type is required
    because a web page may send other types, but not JSON, to a local server without asking it first.

    Raises:
        UnsupportedMediaTypeError: The body is not declared as JSON, or is compressed.
        BodyTooLargeError: The body has more than ``max_bytes``; the rest of it is not read.
    """
    headers = request.headers
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        sent = f"not {media_type!r}" if media_type else "which is missing"
        raise UnsupportedMediaTypeError(
            f"Send the body as JSON with the header Content-Type: application/json, {sent}."
        )
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("Send the body uncompressed, without the header Content-Encoding.")
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
    return b"".join(parts)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body exceeds {max_bytes} bytes; send less in one request.")
