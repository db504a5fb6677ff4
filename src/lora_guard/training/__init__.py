"""Training: the loss, the rows, the resume state and the loop."""
