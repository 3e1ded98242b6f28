"""What a trained network is used for: `revtrain-eval` and `revtrain-export`.

command -> (evaluate, predict, export) -> restore. Hydra is not imported: a checkpoint holds its configuration.

restore    a checkpoint becomes the network that it was trained as
evaluate   accuracy, per class, confusion matrix
predict    class and probability of image files
export     safetensors, ONNX, torch.export; checked against the network itself
"""
