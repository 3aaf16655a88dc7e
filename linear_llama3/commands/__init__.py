"""Commands of `linear-llama3` that use a model."""
