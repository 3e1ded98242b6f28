"""`python -m revtrain` is `revtrain`."""

from revtrain.cli.train import command_line

if __name__ == "__main__":
    command_line()
