"""Proposers by name (``SpeculativeConfig.method``)."""

from __future__ import annotations

from executor.config import SpeculativeConfig
from executor.registry import resolve
from executor.speculative.base import Proposer

REGISTRY = {
    "suffix": "executor.speculative.suffix:SuffixProposer",
    "ngram": "executor.speculative.suffix:NgramProposer",
    "scripted": "executor.speculative.scripted:ScriptedProposer",
}
"""Proposer classes, constructed with the ``SpeculativeConfig`` and the number of slots."""


def create_proposer(config: SpeculativeConfig, max_num_seqs: int) -> Proposer:
    """Creates the proposer named by the configuration."""
    proposer: Proposer = resolve(REGISTRY, config.method, "speculative method")(config, max_num_seqs)
    return proposer
