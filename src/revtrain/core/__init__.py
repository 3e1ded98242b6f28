"""The engine: what an invertible layer is, and the chain that owns the backward pass."""
