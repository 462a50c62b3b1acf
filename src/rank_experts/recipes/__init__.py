"""A YAML file and its data become a model and a trainer; what the commands do."""
