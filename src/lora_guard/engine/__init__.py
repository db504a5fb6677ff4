"""Engines: what runs the chat model and the guard path, behind one protocol."""
