"""Fine-tuning: what is done with a pre-trained encoder."""
