"""Recipes: the YAML file that says what is trained on what, checked and carried out."""
