"""Checkpoints that are complete, exact resumes, and saves on SIGTERM."""
