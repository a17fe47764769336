"""The images of one served model."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol

from msgspec.structs import replace

from api.admission import check_number
from api.errors import RequestError
from api.media.fetch import MediaAccess
from api.media.prompt import place_images
from api.media.reader import ImageReader, Picture
from api.model.history import IMAGE_PART
from api.model.image_spec import ImageSpec
from api.model.tokenizer import Tokenizer
from engine_core.messages import MultiModalFeature

MAX_IMAGES = 64
"""Images of a prompt."""
KINDS = ("image_url", "input_image", "image_pil")
"""Types of parts that are images."""
ROLES = ("user", "tool", "function")
DETAILS = ("auto", "low", "high")

Content = str | Sequence[Any] | None
"""The content of a message."""


class Encoded(Protocol):
    """An image in memory, such as Pillow's."""

    def save(self, file: Any, format: str) -> None: ...


def has_images(contents: Sequence[Content]) -> bool:
    """Whether any message of a conversation has an image."""
    return any(_is_image(part) for content in contents if _is_list(content) for part in content or ())


def _is_list(content: Content) -> bool:
    return isinstance(content, list | tuple)


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in KINDS


class ModelImages:
    """Reads images and places them in prompts."""

    def __init__(
        self,
        spec: ImageSpec,
        tokenizer: Tokenizer,
        threads: Executor,
        access: MediaAccess,
        most: int = MAX_IMAGES,
    ) -> None:
        """Creates it; nothing is read yet.

        Args:
            spec: The model's processor.
            tokenizer: The model's tokenizer.
            threads: Executor for work on large texts.
            access: What URLs may refer to.
            most: Maximum number of images of a prompt.
        """
        self.spec = spec
        self.reader = ImageReader(spec, threads, access)
        self.most = min(most, MAX_IMAGES)
        self._tokenizer = tokenizer
        token = spec.image_token_id if spec.placeholder_id is None else spec.placeholder_id
        self._placeholder = tokenizer.id_to_token(token) or ""
        """What a chat template that knows no images gets in their place."""
        self._end = None if spec.end_id is None else tokenizer.id_to_token(spec.end_id)

    async def take(
        self, roles: Sequence[str], contents: Sequence[Content], owner: str = ""
    ) -> tuple[list[Content], list[Picture]]:
        """Takes the images out of a conversation.

        Args:
            roles: Of each message.
            contents: Of each message.
            owner: Whom the work is for.

        Returns:
            The contents with a short part in place of each image, and the images in order.

        Raises:
            RequestError: An image cannot be read.
        """
        work = []
        results: list[Content] = list(contents)
        for number, (role, content) in enumerate(zip(roles, contents, strict=True)):
            if not _is_list(content) or not has_images([content]):
                continue
            where = f"messages[{number}].content"
            if role not in ROLES:
                raise RequestError(f"{where}: a message with the role {role[:40]!r} must not have images", "messages")
            parts = list(content or ())
            for index, part in enumerate(parts):
                if _is_image(part):
                    work.append((f"{where}[{index}].{part['type']}", part))
                    parts[index] = {"type": IMAGE_PART, "placeholder": self._placeholder}
            results[number] = parts
        check_number(len(work), self.most, "messages", "images")
        pictures = await asyncio.gather(
            *(self._read(part, where, owner) for where, part in work), return_exceptions=True
        )
        found = []
        for picture in pictures:
            if isinstance(picture, BaseException):
                raise picture
            found.append(picture)
        return results, found

    async def _read(self, part: Mapping[str, Any], where: str, owner: str) -> Picture:
        kind = part["type"]
        source: Any = part.get(kind, part.get("image_url"))
        detail = part.get("detail")
        if isinstance(source, Mapping):
            where = f"{where}.url"
            detail, source = source.get("detail", detail), source.get("url")
        if detail not in (None, *DETAILS):
            raise RequestError(f"{where}: detail must be one of {', '.join(DETAILS)}", "messages")
        if not isinstance(source, str):
            raise RequestError(f"{where} must be a URL", "messages")
        return await self.reader.read_url(source, where, "messages", owner, is_low=detail == "low")

    def written(self, text: str) -> str:
        """A prompt with what the model expects around images, where that becomes tokens together with other text."""
        if not self._end or not self._placeholder:
            return text
        return text.replace(self._placeholder, f"\n\n{self._placeholder}{self._end}\n\n")

    def filled_up(self, tokens: list[int]) -> list[int]:
        """The tokens of a text in the length that the model wants."""
        return tokens + [self.spec.pad_token_id] * (self.spec.text_length - len(tokens))

    def place(
        self, prompt: Sequence[int], pictures: Sequence[Picture], field: str, salt: str = ""
    ) -> tuple[list[int], tuple[MultiModalFeature, ...]]:
        """See ``place_images``. Requests share encoded images with those of the same salt."""
        if salt:
            own = [hashlib.sha256(f"{each.identifier} {salt}".encode()).hexdigest() for each in pictures]
            pictures = [replace(each, identifier=name) for each, name in zip(pictures, own, strict=True)]
        return place_images(
            self.spec, prompt, pictures, lambda text: self._tokenizer.encode(text, add_special_tokens=False), field
        )

    def close(self) -> None:
        """Ends the helper process."""
        self.reader.close()
