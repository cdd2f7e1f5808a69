"""Servers that return the log-probabilities of a given text: vLLM, SGLang, llama.cpp, and completions with `echo`."""
