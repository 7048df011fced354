"""Files that trainers import by their path. A trainer may put this folder on sys.path: it holds nothing else."""
