"""The work of a training step (work.py), and how images come to the device (feed.py): what is planned is what runs."""
