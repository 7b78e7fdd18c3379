"""`llmkit inspect`: what a recipe trains on, token by token as its loader hands it out; or what a model consists of."""
