"""Proposers by name (``SpeculativeConfig.method``)."""

from __future__ import annotations

from executor.config import SpeculativeConfig
from executor.registry import resolve
from executor.speculative.base import Proposer

REGISTRY = {"scripted": "executor.speculative.scripted:ScriptedProposer"}
"""Classes that take the ``SpeculativeConfig`` and the number of slots."""


def create_proposer(config: SpeculativeConfig, max_num_seqs: int) -> Proposer:
    """The proposer that the configuration names."""
    proposer: Proposer = resolve(REGISTRY, config.method, "speculative method")(config, max_num_seqs)
    return proposer
