"""The benches behind ``lora-guard bench``: each measures both of its sides in one run and gives ratios."""
