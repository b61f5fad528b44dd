"""Weights to and from other programs' formats: Hugging Face folders, GGUF files, llama2.c."""
