"""Proposers by name (``SpeculativeConfig.method``)."""

from __future__ import annotations

from executor.config import SpeculativeConfig
from executor.registry import resolve
from executor.speculative.base import Proposer, ProposerContext

REGISTRY = {
    "suffix": "executor.speculative.suffix:SuffixProposer",
    "ngram": "executor.speculative.suffix:NgramProposer",
    "draft_model": "executor.speculative.draft_model:DraftModelProposer",
    "eagle3": "executor.speculative.draft_head:DraftHeadProposer",
    "mtp": "executor.speculative.draft_head:DraftHeadProposer",
    "scripted": "executor.speculative.scripted:ScriptedProposer",
}
"""Proposer classes, constructed with the ``SpeculativeConfig``, the number of slots and a ``ProposerContext``."""


def create_proposer(config: SpeculativeConfig, max_num_seqs: int, context: ProposerContext | None = None) -> Proposer:
    """Creates the proposer named by the configuration."""
    create = resolve(REGISTRY, config.method, "speculative method")
    proposer: Proposer = create(config, max_num_seqs, context or ProposerContext())
    return proposer
