"""The Trainer contract: arguments, normalisation of every loss by its own count, logging, resume, export."""
