"""Its presence puts this folder on the import path of every test below it: ``from guards import random_guard``."""
