"""What determines K and V."""

from __future__ import annotations

from pathlib import Path

from executor.config import GGUFHeader, ModelConfig, VisionFile
from executor.identity import model_files


def test_a_vision_part_in_a_file_of_its_own_counts(tmp_path: Path) -> None:
    model, vision = tmp_path / "model.gguf", tmp_path / "mmproj.gguf"
    for path in (model, vision):
        path.touch()
    header = GGUFHeader({}, [])
    config = ModelConfig(model=str(model), vision=VisionFile(str(vision), header, {}))
    assert list(model_files(config)) == [model, vision]
