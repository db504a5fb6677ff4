"""``python -m lora_guard``: the command line."""

from lora_guard.cli import main

if __name__ == "__main__":
    main()
