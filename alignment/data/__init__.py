"""Preference rows: read from files or the hub, or built from a model's own samples. Knows nothing of training."""
