"""`llmkit doctor`: is this machine well, and does a recipe's arithmetic hold? Each failure with its cause and remedy."""
