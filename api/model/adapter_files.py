"""Where an adapter's files are: a local folder or file, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from api.config import ServerConfig
from api.errors import ModelFileError
from api.model.hub import open_hub, parse_hub_name

FILES = ("adapter_config.json", "adapter_model.safetensors")


def locate_adapter(path: str, config: ServerConfig) -> Path:
    """The files of an adapter that the operator names, downloaded if they are a hub's.

    Args:
        path: A folder, a GGUF file, a hub id, or a hub id and the path of a GGUF file there.
        config: Which hub, and where downloads go.

    Returns:
        An absolute path, which need not exist.

    Raises:
        ModelFileError: The download failed, or the repository has no such file.
    """
    local = Path(path).expanduser().absolute()
    name = None if local.exists() else parse_hub_name(path)
    if name is None or name.tag is not None:
        return local
    hub = open_hub(name.repository, config, None)
    if name.file is None:
        return hub.download(FILES)
    found = hub.fetch(name.file)
    if found is None:
        raise ModelFileError(path, f"the repository has no {name.file}")
    return found
