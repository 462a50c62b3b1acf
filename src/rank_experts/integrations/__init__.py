"""What other programs load of this library; nothing here imports those programs until they do."""
