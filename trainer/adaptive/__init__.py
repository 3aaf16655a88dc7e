"""Adaptive groups: a plan for every step (FlexSP, arXiv:2412.01523)."""
