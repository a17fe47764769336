"""Towers: what turns the images of a prompt into embeddings of the language model."""
