"""Load generators: what ``octavo bench`` runs."""
