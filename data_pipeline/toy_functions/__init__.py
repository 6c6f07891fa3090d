"""Small Python functions whose docstring determines the body: a task on which a small coder can be scored."""

from data_pipeline.toy_functions.corpus import ToyCorpus, ToyFunction, build_corpus, generate, write_tasks
from data_pipeline.toy_functions.trees import normalised_tree

__all__ = ["ToyCorpus", "ToyFunction", "build_corpus", "generate", "normalised_tree", "write_tasks"]
