"""After training: merge with a certificate, chat, generate."""
