"""Reads the images of requests. Decoding and resizing happen in a helper process, within limits."""

from __future__ import annotations

import asyncio
import hashlib
import math
import weakref
from collections import OrderedDict
from concurrent.futures import Executor, ThreadPoolExecutor

import msgspec

from api.errors import RequestError
from api.media.fair_slots import FairSlots
from api.media.fetch import FetchError, MediaAccess
from api.model.image_spec import ImageSpec, ProcessedImage, low_detail
from engine_core.launch import Helper, HelperError, HelperLimits, JobError

LIMITS = HelperLimits(
    cpu_seconds=15.0, deadline=60.0, memory_bytes=640 << 20, max_output_bytes=160 << 20, max_file_bytes=0
)
MAX_WAITING_BYTES = 256 << 20
"""Total size of the images that wait for the helper."""
CACHE_BYTES = 256 << 20
"""Size of the processed images that are kept, since the next turn of a conversation sends them again."""
MAX_HELD_BYTES = 1 << 30
"""Size of all processed images of a server: those of unfinished requests, whose journals keep them, and those above."""
MAX_FETCHES = 4
"""Images that are fetched at the same time. Owners take turns: a slow server holds up those who named it."""
MAX_URL = 8192
"""Characters of a URL that is fetched."""
JOBS = {"process": "api.media.pixels:process_job"}


class Picture(msgspec.Struct, frozen=True):
    """A processed image with the hash of its content."""

    identifier: str
    image: ProcessedImage


class ImageReader:
    """Reads images for one model. Its helper process starts with the first image."""

    def __init__(self, spec: ImageSpec, threads: Executor, access: MediaAccess) -> None:
        """Creates a reader.

        Args:
            spec: The model's processor.
            threads: Executor in which large texts are encoded and hashed.
            access: What URLs may refer to.
        """
        self.spec = spec
        self._threads = threads
        self._access = access
        self._fetches = ThreadPoolExecutor(MAX_FETCHES, "media")
        self._turns = FairSlots(MAX_FETCHES)
        self._helper = Helper("octavo image helper", JOBS, LIMITS, max_waiting_bytes=MAX_WAITING_BYTES)
        self._cache: OrderedDict[bytes, Picture] = OrderedDict()
        self._cached_bytes = 0
        self.max_held_bytes: float = math.inf
        """Size of the processed images that may be in memory; more are refused until requests end."""
        self._held_bytes = 0

    async def read_url(self, url: str, where: str, field: str, owner: str = "", *, is_low: bool = False) -> Picture:
        """Reads an image from a URL.

        Args:
            url: ``data:image/...;base64,...``, or one that the operator allows.
            where: Its place in the request, for errors.
            field: The field of the request.
            owner: Whom the work is for; owners take turns if many images wait.
            is_low: The client wants little detail.

        Raises:
            RequestError: It is no image that can be read.
        """
        head, comma, text = url.partition(",")
        if head[:5].lower() != "data:":
            data = await self._fetch(url, where, field, owner)
            return await self.read_bytes(data, where, field, owner, is_low=is_low)
        if not comma or not head[-7:].lower() == ";base64":
            raise RequestError(f"{where} must be a data URL in base64, such as data:image/png;base64,...", field)

        spec = low_detail(self.spec) if is_low else self.spec

        def prepare() -> tuple[bytes, bytes]:
            try:
                data = text.encode("ascii")
            except UnicodeEncodeError:
                raise RequestError(f"{where}: the image cannot be read: its base64 is invalid", field) from None
            return data, self._key(spec, b"base64", data)

        data, key = await asyncio.get_running_loop().run_in_executor(self._threads, prepare)
        return await self._read(spec, key, data, (where, field), is_base64=True, owner=owner)

    async def _fetch(self, url: str, where: str, field: str, owner: str) -> bytes:
        access = self._access
        if not access.domains and not access.folder:
            raise RequestError(
                f"{where} must be a data URL (data:image/png;base64,...); other URLs need a server started with "
                "--allowed-media-domains or --allowed-local-media-path",
                field,
            )
        if len(url) > MAX_URL:
            raise RequestError(f"{where}: the URL has more than {MAX_URL} characters", field)
        try:
            loop = asyncio.get_running_loop()
            return await self._turns.run(owner, lambda: loop.run_in_executor(self._fetches, access.fetch, url))
        except FetchError as error:
            raise RequestError(f"{where}: the image cannot be fetched: {error}", field) from None

    async def read_bytes(
        self, data: bytes, where: str, field: str, owner: str = "", *, is_low: bool = False
    ) -> Picture:
        """Reads an image file. See ``read_url``."""
        spec = low_detail(self.spec) if is_low else self.spec
        key = await asyncio.get_running_loop().run_in_executor(self._threads, self._key, spec, b"bytes", data)
        return await self._read(spec, key, data, (where, field), is_base64=False, owner=owner)

    def _key(self, spec: ImageSpec, kind: bytes, data: bytes) -> bytes:
        digest = hashlib.sha256(spec.key + kind)
        digest.update(data)
        return digest.digest()

    async def _read(
        self, spec: ImageSpec, key: bytes, data: bytes, place: tuple[str, str], *, is_base64: bool, owner: str
    ) -> Picture:
        where, field = place
        found = self._cache.get(key)
        if found is not None:
            self._cache.move_to_end(key)
            return found
        # As the helper's ``ImageJob``, whose module imports Pillow.
        job = msgspec.msgpack.encode({"spec": spec, "data": data, "is_base64": is_base64})
        try:
            result = await asyncio.wrap_future(self._helper.submit("process", job, owner=owner))
        except JobError as error:
            raise RequestError(f"{where}: the image cannot be read: {error}", field) from None
        except HelperError as error:
            if error.is_fault_of_data:
                raise RequestError(f"{where}: the image cannot be read: {error}", field) from None
            raise RequestError(
                f"images cannot be read at the moment: {error}", field, status=503, kind="ServiceUnavailableError"
            ) from None
        image = msgspec.msgpack.decode(result, type=ProcessedImage)
        self._hold(image, field)
        picture = Picture(key.hex(), image)
        self._keep(key, picture)
        return picture

    def _hold(self, image: ProcessedImage, field: str) -> None:
        """Counts an image for as long as anything refers to its pixels.

        Raises:
            RequestError: 429: there are too many.
        """
        size = image.num_bytes
        while self._cache and self._held_bytes + size > self.max_held_bytes:
            self._forget_oldest()
        if self._held_bytes + size > self.max_held_bytes:
            raise RequestError(
                "The images of other requests take all the memory for images. Please try again in 5 s.",
                field,
                status=429,
                kind="RateLimitError",
                headers={"Retry-After": "5"},
            )
        self._held_bytes += size
        for part in image.patches[1:]:
            weakref.finalize(part, self._let_go, len(part.data)).atexit = False
            size -= len(part.data)
        weakref.finalize(image.patches[0], self._let_go, size).atexit = False

    def _let_go(self, size: int) -> None:
        self._held_bytes -= size

    def _forget_oldest(self) -> None:
        _, dropped = self._cache.popitem(last=False)
        self._cached_bytes -= dropped.image.num_bytes

    def _keep(self, key: bytes, picture: Picture) -> None:
        size = picture.image.num_bytes
        if size > CACHE_BYTES or key in self._cache:
            return
        self._cache[key] = picture
        self._cached_bytes += size
        while self._cached_bytes > CACHE_BYTES:
            self._forget_oldest()

    def close(self) -> None:
        """Ends the helper process."""
        self._fetches.shutdown(wait=False, cancel_futures=True)
        self._helper.close()
