"""From sources to a corpus: the steps of the corpus command, and the files between them."""
