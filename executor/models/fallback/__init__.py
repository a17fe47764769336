"""Architectures without an implementation of our own, run through transformers' model classes.

transformers computes norms, activations and positions; attention, products and embeddings are ours, through
transformers' attention interface and by replacing modules.
"""
