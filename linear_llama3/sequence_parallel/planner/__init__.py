"""Adaptive groups: which ranks share which sequences, chosen anew for every step. Imports no torch."""
