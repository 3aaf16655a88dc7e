"""The documents and rows that a model is trained on."""
