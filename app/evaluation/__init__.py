"""The tokenizer's card; answers beside every control."""
