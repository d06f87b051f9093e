"""Who sees whom in attention: documents kept apart, and the language models of UniLM."""
