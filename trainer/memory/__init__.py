"""Memory of training, computed and measured."""
