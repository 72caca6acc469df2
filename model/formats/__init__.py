"""The file formats that checkpoints come in: each reader gives the tensors, under their Hugging Face names."""
