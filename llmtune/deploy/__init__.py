"""After training: merged models, GGUF files and publications, each certified against the tuned model."""
