"""What a language model costs and how well it predicts: perplexity and speed, dense and compressed side by side."""
