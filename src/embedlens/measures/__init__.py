"""Studies by subject: (model, samples) → rows for `embedlens.run`. No figures, no sentences, no verdicts."""
