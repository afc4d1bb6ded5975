"""Loaders: batches of views for training, and batches of plain images for evaluation."""
