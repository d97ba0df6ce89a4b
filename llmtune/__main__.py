"""`python -m llmtune`."""

from llmtune.cli import main

if __name__ == "__main__":
    main()
