"""How adapters are trained: learning rates by matrix, frozen matrices, restarts and their schedule."""
