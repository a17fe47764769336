"""Images of requests: what may be in memory."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import pytest

from api.errors import RequestError
from api.media.fair_slots import FairSlots
from api.media.fetch import MediaAccess
from api.media.reader import ImageReader, Picture
from api.model.image_spec import ImageSpec, ProcessedImage
from engine_core.messages import Tensor

SPEC = ImageSpec(
    family="llava",
    image_token_id=1,
    patch_size=1,
    size={"height": 1, "width": 1},
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
SIZE = 1000


class FakeHelper:
    """Makes images of ``SIZE`` bytes."""

    def submit(self, name: str, data: bytes, *, owner: str = "") -> Future[bytes]:
        nothing = Tensor("uint8", (0,), b"")
        image = ProcessedImage((Tensor("uint8", (SIZE,), bytes(SIZE)),), nothing, nothing, 1, 1)
        future: Future[bytes] = Future()
        future.set_result(msgspec.msgpack.encode(image))
        return future

    def close(self) -> None:
        pass


def test_images_of_unfinished_requests_are_bounded() -> None:
    async def run() -> None:
        with ThreadPoolExecutor(1) as threads:
            reader = ImageReader(SPEC, threads, MediaAccess())
            reader._helper.close()
            reader._helper = FakeHelper()  # type: ignore[assignment]

            async def read(name: str) -> Picture:
                return await reader.read_bytes(name.encode(), "messages[0]", "messages")

            held = [await read(name) for name in "abc"]
            reader.max_held_bytes = 4 * SIZE
            for name in "defg":
                await read(name)  # each takes the place of the one before, which only the cache holds
            held.append(await read("h"))
            with pytest.raises(RequestError) as caught:
                await read("i")
            assert caught.value.status == 429
            held.pop()
            await read("i")
            reader.close()

    asyncio.run(run())


def test_long_urls_are_refused() -> None:
    async def run() -> None:
        with ThreadPoolExecutor(1) as threads:
            reader = ImageReader(SPEC, threads, MediaAccess(domains=("example.org",)))
            with pytest.raises(RequestError, match="8192 characters"):
                await reader.read_url("https://example.org/" + "a" * 9000, "messages[0]", "messages")
            reader.close()

    asyncio.run(run())


def test_a_place_goes_to_the_owner_who_has_the_fewest() -> None:
    async def run() -> None:
        slots, order = FairSlots(2), list[str]()
        ends = {name: asyncio.get_running_loop().create_future() for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1")}

        def begin(name: str) -> asyncio.Future[None]:
            order.append(name)
            return ends[name]

        def start(name: str) -> asyncio.Task[None]:
            return asyncio.create_task(slots.run(name[0], lambda: begin(name)))

        async def turn(*names: str) -> list[str]:
            """Ends some work, and tells what has begun since."""
            before = len(order)
            for name in names:
                ends[name].set_result(None)
            for _ in range(5):
                await asyncio.sleep(0)
            return order[before:]

        tasks = {name: start(name) for name in ends if name != "c1"}
        assert await turn() == ["a1", "a2"]
        assert await turn("a1") == ["b1"]
        tasks["a3"].cancel()
        assert await turn("a2") == ["a4"]
        tasks["b2"].cancel()
        tasks["a4"].cancel()  # its work goes on, and keeps the place
        tasks["c1"] = start("c1")
        assert await turn() == []
        assert await turn("a4", "b1") == ["c1"]
        assert await turn("c1") == [] and slots._num_free == 2
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    asyncio.run(run())
