"""Where text and probabilities come from. Engines know nothing of SPA."""
