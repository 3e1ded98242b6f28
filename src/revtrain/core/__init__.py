"""The engine: what an invertible layer is, and the chain that runs the backward pass through such layers.

layer           `InvertibleLayer`, which every layer of a chain is
chain           `InvertibleChain`: layers in a row, of which no activation is stored
state_format    the number format of the activations between the layers
gradients       the parameter gradients of one backward pass
random_state    the same random numbers when a function is computed again
repeats         leaves out equal layers where nothing but the memory of a step is asked for
"""
