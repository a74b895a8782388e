"""Knows pictures: from a file to embeddings that stand in a prompt; knows no language model."""
