"""One decoder for the Llama family and its relatives: specs from Hugging Face configs, weights, tokenizer files."""
