"""Tasks made by rule: what a model must remember is known, and so is chance."""
