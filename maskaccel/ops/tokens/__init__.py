"""Token ops: which rows run, and the way there and back."""
