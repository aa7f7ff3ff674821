"""Will it fit: memory and time of a config on a GPU that is not here, from the compiled program itself."""
