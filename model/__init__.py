"""The decoder: pure functions on pytrees, which know nothing of cache policy, text or HTTP.

- `config`: what a model is
- `families`: what is served, read from a Hugging Face config.json, and the names of its tensors
- `layout`: which tensors of a checkpoint fill which array of Params
- `checkpoint`: weights from disk to Params and back
- `fingerprint`: the name of a model with its weights
- `params`: the weights as a pytree
- `memory`, `published`: what a model takes of a device, and the shapes of published ones
- `decoder`: the forward pass
- `linear`: its matrix products
- `experts`: its mixtures of experts
- `sharding`: the same model on several devices
- `rope`: rotary position embedding
- `rope_scaling`: another stretching of it than a checkpoint's
- `batch`: the ragged batch, and what every attention over it agrees on
- `kv`: the page pool as arrays
- `attention`: the entry point of attention over the pool
- `sampling`: from logits to token ids
- `kernels`: attention and small matrix products, for GPUs, CPUs and XLA
"""
