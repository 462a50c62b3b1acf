"""Every architecture of the installed transformers, tiny, with LoRA as the control: `python -m architectures`."""
