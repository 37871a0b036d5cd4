"""Pushing an adapter: its files as blobs that the server lacks, in pieces that survive a broken connection, then a manifest that names them.

Archives are one multipart request, and so is everything where uploads in pieces do not work out: another replica answers, which does not know
the upload, or too many have been left unfinished.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path

from medley_client.adapter_flows import ADAPTERS, conditions, read_pushed
from medley_client.bodies import Multipart, Piece, Report
from medley_client.errors import ApiError, CannotConnect
from medley_client.files import ARCHIVES, File, Progress, find_files
from medley_client.flow import IDEMPOTENCY_KEY, Call, Flow, Pause, backoff, head, request, send, work
from medley_client.remembered import RememberedUploads
from medley_client.types import PushedAdapter

PIECE = 8 << 20
BLOBS = "/v1/blobs"
_UPLOADS = f"{BLOBS}/uploads"
_BREAKS = 5
"""How often in a row a connection may break before an upload gives up, after some 15 s."""


@dataclass(frozen=True, slots=True)
class Push:
    """What is pushed, as what, and under which condition. Without ``uploads`` nothing is remembered for a later push."""

    source: Path
    name: str
    rank: int | None = None
    exact: bool = False
    tag: str | None = None
    if_match: str | None = None
    create: bool = False
    idempotency_key: str | None = None
    uploads: RememberedUploads | None = None
    progress: Progress | None = None

    @property
    def fields(self) -> dict[str, str]:
        return {"name": self.name} if self.tag is None else {"name": self.name, "tag": self.tag}

    @property
    def headers(self) -> dict[str, str]:
        """The key makes it safe to send the request again when no reply came: the server then gives the one that it kept."""
        return {IDEMPOTENCY_KEY: self.idempotency_key or secrets.token_hex(16), **conditions(self.if_match, self.create)}

    def report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)


def push(wanted: Push) -> Flow[PushedAdapter]:
    """Raises MedleyError with what is missing of the adapter, before anything is sent."""
    files = find_files(wanted.source, rank=wanted.rank, exact=wanted.exact)
    headers = wanted.headers
    if files[0].name.endswith(ARCHIVES):
        return (yield from _push_whole(wanted, files, headers))
    try:
        return (yield from _push_blobs(wanted, files, headers))
    except ApiError as error:
        if error.status != HTTPStatus.NOT_FOUND and error.code != "too_many_uploads":
            raise
    return (yield from _push_whole(wanted, files, headers))


def _push_whole(wanted: Push, files: list[File], headers: dict[str, str]) -> Flow[PushedAdapter]:
    body = Multipart(wanted.fields, files, partial(wanted.report, "sending"))
    return read_pushed((yield from request(Call("POST", ADAPTERS, headers=headers, body=body))))


def _push_blobs(wanted: Push, files: list[File], headers: dict[str, str]) -> Flow[PushedAdapter]:
    total = sum(file.nbytes for file in files)
    digests: dict[str, str] = {}
    before = 0
    for file in files:
        report = _reporter(wanted, "hashing", before, total)
        digests[file.name] = yield from work(partial(file.digest, report))
        before += file.nbytes
    before = 0
    for file in files:
        report = _reporter(wanted, "sending", before, total)
        if (yield from head(f"{BLOBS}/{digests[file.name]}")) is None:
            yield from _upload(file, digests[file.name], wanted.uploads, report)
        before += file.nbytes
        report(file.nbytes)
    manifest = {**wanted.fields, "files": digests}
    return read_pushed((yield from request(Call("POST", ADAPTERS, manifest, headers=headers))))


def _upload(file: File, digest: str, uploads: RememberedUploads | None, report: Report) -> Flow[None]:
    """One blob. Raises ApiError, with status 404 when the server does not know the upload any more."""
    if file.nbytes <= PIECE:
        uploads = None  # It arrives at once or not at all: there is nothing to go on from.
    upload, offset = yield from _begin(digest, uploads)
    path = f"{_UPLOADS}/{upload}"
    try:
        yield from _send_pieces(file, digest, path, offset, report)
    except ApiError as error:
        is_gone, is_wrong = error.status == HTTPStatus.NOT_FOUND, error.code == "digest_mismatch"
        if uploads and (is_gone or is_wrong):
            uploads.forget(digest)
        if is_wrong:
            yield from send(Call("DELETE", path))
        # Another push of the same bytes may have finished the upload, or this one has and the reply was lost.
        if not is_gone or (yield from head(f"{BLOBS}/{digest}")) is None:
            raise
    if uploads:
        uploads.forget(digest)


def _begin(digest: str, uploads: RememberedUploads | None) -> Flow[tuple[str, int]]:
    """An upload's id and how much of it has arrived: of one that was cut off, or a new one."""
    upload = uploads.recall(digest) if uploads else None
    if upload is not None and (reply := (yield from head(f"{_UPLOADS}/{upload}"))) is not None:
        return upload, int(reply.headers["upload-offset"])
    begun: str = (yield from request(Call("POST", _UPLOADS)))["id"]
    if uploads:
        uploads.remember(digest, begun)
    return begun, 0


def _send_pieces(file: File, digest: str, path: str, offset: int | None, report: Report) -> Flow[None]:
    """Bring an upload from ``offset`` to the file's end and finish it. After a broken connection the server is asked how far it is."""
    breaks = 0
    while True:
        try:
            if offset is None:
                offset = int((yield from send(Call("HEAD", path))).headers["upload-offset"])
            if offset >= file.nbytes:
                yield from send(Call("PUT", path, params={"digest": digest}))
                return
            piece = Piece(file, offset, min(offset + PIECE, file.nbytes), report)
            call = Call("PATCH", path, headers={"upload-offset": str(offset)}, body=piece)
            offset = int((yield from send(call)).headers["upload-offset"])
            breaks = 0
        except (CannotConnect, ApiError) as error:
            if breaks == _BREAKS or (isinstance(error, ApiError) and error.code != "upload_offset_mismatch"):
                raise
            yield Pause(backoff(breaks))
            offset, breaks = None, breaks + 1


def _reporter(wanted: Push, what: str, before: int, total: int) -> Callable[[int], None]:
    return lambda position: wanted.report(what, before + position, total)
