"""Views: the published augmentation, on PIL images and on whole batches."""
