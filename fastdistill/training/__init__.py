"""What train.py uses; the only part of the package that imports transformers, datasets and accelerate."""
