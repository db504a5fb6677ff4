"""Guards in other programs' formats: a bundle that llama.cpp loads beside a quantised chat model."""
