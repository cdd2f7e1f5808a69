"""Engines that write the student's replies, with weights that the trainer refreshes: vLLM and SGLang."""
