"""What a checkpoint holds and whether it can be served: safetensors headers, directories, model configurations."""
