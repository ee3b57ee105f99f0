"""Models and tokenizers from a name, and text from a model. Knows nothing of recipes, objectives or training."""

from alignment.models.loading import load_model, load_tokenizer, resolve_path

__all__ = ["load_model", "load_tokenizer", "resolve_path"]
