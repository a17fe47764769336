"""Of ray's strategies, the one that we use."""

from __future__ import annotations

from typing import Any


class PlacementGroupSchedulingStrategy:
    def __init__(self, placement_group: Any, placement_group_bundle_index: int) -> None:
        self.group, self.bundle = placement_group, placement_group_bundle_index
