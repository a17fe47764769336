"""Where an adapter's files are: a local folder or file, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from api.config import ServerConfig
from api.model.hub import open_hub, parse_hub_name

FILES = ("adapter_config.json", "adapter_model.safetensors")


def locate_adapter(path: str, config: ServerConfig) -> Path:
    """The files of an adapter that the operator names, downloaded if they are a hub's.

    Args:
        path: A folder, a GGUF file, or a hub id.
        config: Which hub, and where downloads go.

    Returns:
        An absolute path, which need not exist.

    Raises:
        ModelFileError: The download failed.
    """
    local = Path(path).expanduser().absolute()
    name = None if local.exists() else parse_hub_name(path)
    if name is None or name.tag is not None or name.file is not None:
        return local
    return open_hub(name.repository, config, None).download(FILES)
