"""Placement groups, which have their places at once."""

from __future__ import annotations

from typing import Any

has_room = True


class PlacementGroup:
    def __init__(self, bundles: list[dict[str, float]], strategy: str) -> None:
        self.bundles, self.strategy = bundles, strategy

    def wait(self, timeout: float) -> bool:
        return has_room


def placement_group(bundles: list[dict[str, float]], strategy: str) -> Any:
    return PlacementGroup(bundles, strategy)
