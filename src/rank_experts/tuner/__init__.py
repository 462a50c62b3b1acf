"""PEFT's contract: which modules are targets, the tuner, and injection."""
