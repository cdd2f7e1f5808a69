"""The student: one decoder, driven by a config."""
