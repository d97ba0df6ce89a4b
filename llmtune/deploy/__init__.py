"""After training: merged models, GGUF files and publications, each certified against what was trained."""
