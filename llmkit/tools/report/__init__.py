"""`llmkit report`: runs, pipelines and their results as one HTML page that needs no network."""
