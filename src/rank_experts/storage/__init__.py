"""Bytes on the disk: a config and its weights as a pair, and files that change as a whole or not at all."""
