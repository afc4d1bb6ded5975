"""Sources: where the images are and what each of them is called."""
