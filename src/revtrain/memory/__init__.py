"""Memory of a training step: counted from outside (live.py), and in closed form (closed_form.py)."""
