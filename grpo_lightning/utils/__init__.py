"""Helpers that know nothing of training: files, signals, imports, lazy names, checks of foreign input."""
