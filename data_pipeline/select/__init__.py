"""Selection and sampling: which documents are taken, and how much of each dataset is seen in training."""
