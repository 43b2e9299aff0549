"""What both sides know about a model: its geometry, rotary tables, weights on disk and tokenizer.

The trusted process imports this layer, so neither torch nor transformers may appear in it.
"""
