"""Hubs that models are downloaded from: Hugging Face and ModelScope. The only module that downloads."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from api.config import ServerConfig
from api.errors import ModelFileError
from api.model.kept_folders import cache_folder

T = TypeVar("T")

SITES = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co|modelscope\.cn/models)/")
REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<tag>[\w.-]+)|/(?P<file>[\w./-]+\.gguf))?")

CONVERSION_BOT = "SFconvertbot"
CONVERSION_TITLE = "Adding `safetensors` variant of this model"
"""Author and title of the pull requests in which Hugging Face's bot offers a converted model."""


class HubName(NamedTuple):
    """A model on a hub, as users write it."""

    repository: str
    """owner/name."""
    tag: str | None = None
    """What follows the colon: the quantisation of a GGUF file, or the file's name."""
    file: str | None = None
    """Path of a GGUF file in the repository."""


def parse_hub_name(name: str) -> HubName | None:
    """Reads ``owner/name``, ``owner/name:Q4_K_M``, ``owner/name/file.gguf``, or the page's URL; None: it is none."""
    match = REPOSITORY.fullmatch(SITES.sub("", name, count=1).rstrip("/"))
    return None if match is None else HubName(match["repository"], match["tag"], match["file"])


class Hub(Protocol):
    """One repository on a hub, at one revision.

    All methods raise ``ModelFileError`` with a line that says why the repository is not available.
    """

    repository: str

    def files(self) -> list[str]:
        """Paths of all files; without a connection, of those on this machine; empty if unknown."""

    def fetch(self, file: str) -> Path | None:
        """Downloads one file; None if the repository does not have it."""

    def download(self, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
        """Downloads the files that match a pattern. Returns their folder."""

    def gguf_architecture(self) -> str | None:
        """The architecture of the repository's GGUF files, if the hub knows it."""

    def conversion(self) -> Hub | None:
        """The same repository at the revision where the hub keeps its weights as safetensors, if there is one."""


def open_hub(repository: str, config: ServerConfig, revision: str | None) -> Hub:
    """The repository on the configured hub.

    Raises:
        ModelFileError: The hub's package is not installed.
    """
    hub = ModelScope if config.use_modelscope else HuggingFace
    return hub(repository, config, revision)


class HuggingFace:
    """A repository on huggingface.co, or on the hub that ``HF_ENDPOINT`` names."""

    def __init__(self, repository: str, config: ServerConfig, revision: str | None) -> None:
        self.repository = repository
        self._config = config
        self._revision = revision
        from huggingface_hub.utils.logging import get_logger

        get_logger("huggingface_hub").handlers.clear()  # or each line would be there twice
        for client in ("httpx", "httpx2"):
            logging.getLogger(client).setLevel(logging.WARNING)  # they log each request
        # The package's own default is HF_TOKEN or the logged-in user; True requires one of these.
        self._token: str | bool | None = True if config.hf_token in ("True", "true") else config.hf_token

    def files(self) -> list[str]:
        import huggingface_hub  # imported late: most servers have their model on disk

        try:
            return huggingface_hub.list_repo_files(self.repository, revision=self._revision, token=self._token)
        except Exception:  # the download will report the reason
            pass
        try:
            # Newer versions raise for a snapshot that lacks files that match.
            here = huggingface_hub.snapshot_download(
                self.repository, local_files_only=True, allow_patterns=["no file"], **self._options
            )
        except Exception:
            return []
        return [str(path.relative_to(here)) for path in sorted(Path(here).rglob("*")) if path.is_file()]

    def fetch(self, file: str) -> Path | None:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def fetch() -> Path | None:
            try:
                return Path(huggingface_hub.hf_hub_download(self.repository, file, **self._options))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None

        return self._try(fetch)

    def download(self, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
        import huggingface_hub

        return self._try(
            lambda: Path(
                huggingface_hub.snapshot_download(
                    self.repository, allow_patterns=list(patterns), ignore_patterns=list(ignore), **self._options
                )
            )
        )

    def gguf_architecture(self) -> str | None:
        import huggingface_hub

        try:
            info = huggingface_hub.HfApi().model_info(
                self.repository, revision=self._revision, token=self._token, expand=["gguf"]
            )
            found = (info.gguf or {}).get("architecture")
        except Exception:  # no connection, or a mirror that does not know the field
            return None
        return found if isinstance(found, str) else None

    def conversion(self) -> Hub | None:
        """See ``Hub.conversion``. Pull requests of others do not count, nor do those that the main branch outran."""
        if self._revision not in (None, "main"):
            return None
        import huggingface_hub

        api = huggingface_hub.HfApi(token=self._token)
        try:
            for found in api.get_repo_discussions(
                self.repository, author=CONVERSION_BOT, discussion_type="pull_request", discussion_status="open"
            ):
                if found.author != CONVERSION_BOT or found.title != CONVERSION_TITLE or not found.git_reference:
                    continue
                commits = api.list_repo_commits(self.repository, revision=found.git_reference)
                if len(commits) > 1 and commits[1].commit_id == api.list_repo_commits(self.repository)[0].commit_id:
                    # By commit, since the reference may move on.
                    with contextlib.suppress(OSError):
                        self._known_conversion.parent.mkdir(parents=True, exist_ok=True)
                        self._known_conversion.write_text(commits[0].commit_id)
                    return HuggingFace(self.repository, self._config, commits[0].commit_id)
        except Exception:  # no connection, or a mirror without pull requests
            with contextlib.suppress(OSError):
                return HuggingFace(self.repository, self._config, self._known_conversion.read_text())
        return None

    @property
    def _known_conversion(self) -> Path:
        """File with the commit of the conversion that was found last, for starts without a connection."""
        return cache_folder() / "conversions" / self.repository.replace("/", "--")

    @property
    def _options(self) -> dict[str, Any]:
        return {"revision": self._revision, "token": self._token, "cache_dir": self._config.download_dir}

    def _try(self, work: Callable[[], T]) -> T:
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return work()
        except LocalEntryNotFoundError as error:
            raise ModelFileError(self.repository, "not on this machine, and the hub cannot be reached") from error
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ModelFileError(self.repository, f"download failed: {error}") from error


class ModelScope:
    """A repository on modelscope.cn, through the package ``modelscope``."""

    def __init__(self, repository: str, config: ServerConfig, revision: str | None) -> None:
        self.repository = repository
        self._revision = revision
        self._cache = config.download_dir
        try:
            from modelscope.hub.api import HubApi
            from modelscope.hub.file_download import model_file_download
            from modelscope.hub.snapshot_download import snapshot_download
        except ImportError:
            raise ModelFileError("--use-modelscope", "needs the package: pip install modelscope") from None
        self._api, self._fetch, self._download = HubApi(), model_file_download, snapshot_download

    def files(self) -> list[str]:
        try:
            found = self._api.get_model_files(self.repository, revision=self._revision, recursive=True)
        except Exception:  # the download will report the reason
            return []
        return [entry["Path"] for entry in found if entry.get("Type") != "tree"]

    def fetch(self, file: str) -> Path | None:
        if file not in (self.files() or [file]):
            return None
        try:
            path = self._fetch(self.repository, file, revision=self._revision, cache_dir=self._cache)
        except Exception as error:  # the package has no common base of its errors
            self._fail(error)
        return Path(path)

    def download(self, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
        try:
            folder = self._download(
                self.repository,
                revision=self._revision,
                cache_dir=self._cache,
                allow_file_pattern=list(patterns),
                ignore_file_pattern=list(ignore),
            )
        except Exception as error:
            self._fail(error)
        return Path(folder)

    def gguf_architecture(self) -> str | None:
        return None

    def conversion(self) -> Hub | None:
        return None

    def _fail(self, error: Exception) -> NoReturn:
        raise ModelFileError(self.repository, f"download from ModelScope failed: {error}") from error
